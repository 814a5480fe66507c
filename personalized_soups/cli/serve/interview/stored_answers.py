"""Keep the answers of an interview in a profile store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from personalized_soups.users.profiles.failures import AnswersChanged

if TYPE_CHECKING:
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
            AnswersChanged: if another session has changed the user's answers.
        """
        try:
            self._answers.add(self._user, answered, expected=self._count)
        except AnswersChanged as error:
            raise self._conflict(error) from error
        # not the count that `add` returns: two sessions may give the same answer, and then one of them goes on
        self._count += 1

    def undo(self) -> None:
        """Delete the last answer.

        Raises:
            AnswersChanged: if another session has changed the user's answers.
        """
        try:
            self._answers.undo(self._user, expected=self._count)
        except AnswersChanged as error:
            raise self._conflict(error) from error
        self._count -= 1

    def _conflict(self, error: AnswersChanged) -> AnswersChanged:
        return AnswersChanged(
            f"{error.what}; your last key was not stored",
            where=error.where,
            mend=f"end the other session, then continue with all stored answers: {self._resume}",
            current=error.current,
        )
