"""Keep the answers of an interview in a profile store."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from personalized_soups.declare.evidence import AnsweredQuestion
    from personalized_soups.users.profiles.answers import AnswerStore


class StoredAnswers:
    """Stores each answer at once, and notices if another session changes the user's answers at the same time.

    Args:
        answers: the store of all users' answers.
        user: the user.
        count: the number of the user's answers in the store.
        resume: the command that continues the interview, for errors.
    """

    def __init__(self, answers: AnswerStore, user: str, count: int, *, resume: str) -> None:
        self._answers = answers
        self._user = user
        self._count = count
        self._resume = resume

    def add(self, answered: AnsweredQuestion) -> None:
        """Store an answer after the answers so far.

        Raises:
            AnswersChanged, AnsweredOtherwise: if another session has changed the user's answers.
        """
        with self._naming_the_way_on():
            self._answers.add(self._user, answered, expected=self._count)
        # not the count that `add` returns: two sessions may give the same answer, and then one of them goes on
        self._count += 1

    def undo(self) -> None:
        """Delete the last answer.

        Raises:
            AnswersChanged: if another session has changed the user's answers.
        """
        with self._naming_the_way_on():
            self._answers.undo(self._user, expected=self._count)
        self._count -= 1

    @contextmanager
    def _naming_the_way_on(self) -> Iterator[None]:
        """Add the command that continues to the errors of two sessions at once."""
        from personalized_soups.users.profiles.failures import AnsweredOtherwise, AnswersChanged

        mend = f"end the other session, then continue with the stored answers: {self._resume}"
        try:
            yield
        except AnswersChanged as error:
            what = f"{error.what}; your last key was not stored"
            raise AnswersChanged(what, where=error.where, mend=mend, current=error.current) from error
        except AnsweredOtherwise as error:
            what = f"{error.what}, which another session has added; your last key was not stored"
            raise AnsweredOtherwise(what, where=error.where, mend=mend) from error
