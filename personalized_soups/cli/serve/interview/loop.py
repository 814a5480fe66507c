"""The loop of an interview: show a question, read a choice, store the answer at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

from personalized_soups.cli.serve.interview.commands import choice_of
from personalized_soups.cli.serve.interview.screen import question_text, so_far_text

if TYPE_CHECKING:
    from personalized_soups.cli.serve.interview.commands import Command
    from personalized_soups.declare.evidence import AnsweredQuestion
    from personalized_soups.declare.side_rule import SideRule
    from personalized_soups.users.answers.session import InferenceSession, ShownQuestion

# How an interview ended: all questions were asked, the user quit, or the input ended before the questions did.
Ending: TypeAlias = Literal["done", "quit", "end of input"]


class Answerer(Protocol):
    """Someone who answers questions."""

    def command(self, shown: ShownQuestion, *, can_go_back: bool) -> Command | None:
        """Return what to do with the question that is shown. Return None at the end of the input.

        Args:
            shown: the question.
            can_go_back: whether there is an answer to take back.
        """


class AnswerLog(Protocol):
    """Where the answers of one user are kept."""

    def add(self, answered: AnsweredQuestion) -> None:
        """Store an answer after the answers so far."""

    def undo(self) -> None:
        """Delete the last answer."""


class ForgottenAnswers:
    """A log that keeps nothing, for simulated users."""

    def add(self, answered: AnsweredQuestion) -> None:
        """Store nothing."""

    def undo(self) -> None:
        """Delete nothing."""


@dataclass(frozen=True, slots=True)
class Interview:
    """Asks one user the questions of a session.

    Attributes:
        answerer: who answers.
        log: where the answers are stored. Each is stored before the next question is shown.
        rule: knows the dimension of each expert.
        show: prints a text.
        width: returns the width of the terminal.
    """

    answerer: Answerer
    log: AnswerLog
    rule: SideRule
    show: Callable[[str], None]
    width: Callable[[], int]

    def run(self, session: InferenceSession) -> tuple[InferenceSession, Ending]:
        """Ask until the session is done, the user quits, or the input ends.

        Returns:
            The session after the answers, and how the interview ended.

        Raises:
            SoupError: if an answer cannot be stored. The answers before it are stored.
        """
        while (shown := session.next) is not None:
            self._show(session, shown)
            command = self.answerer.command(shown, can_go_back=bool(session.answers))
            if command == "quit" or command is None:
                return session, "end of input" if command is None else "quit"
            if command == "back":
                session = self._back(session)
                continue
            self.show(f"answer: {command}\n")
            before = session
            session = session.answered(shown.question.id, choice_of(command, swapped=shown.swapped))
            self.log.add(session.answers[-1])
            self._show_progress(before, session)
        return session, "done"

    def _show(self, session: InferenceSession, shown: ShownQuestion) -> None:
        most = min(session.stopping.max_questions, len(session.pool))
        total = str(most) if session.stopping.certainty is None else f"at most {most}"
        self.show(question_text(shown, number=session.num_asked + 1, total=total, width=self.width()))

    def _back(self, session: InferenceSession) -> InferenceSession:
        before = session.undone()
        self.log.undo()
        self.show("the last answer is taken back\n")
        return before

    def _show_progress(self, before: InferenceSession, session: InferenceSession) -> None:
        from personalized_soups.users.answers.preferences import preferences_of

        self.show(so_far_text(preferences_of(session.estimate, session.pool.names, self.rule), session.agreement))
        # A note counts the answers, so its text changes with every answer. It is shown when it first applies.
        if not before.notes():
            for note in session.notes():
                self.show(f"note: {note}")
        self.show("")
