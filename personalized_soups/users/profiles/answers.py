"""`AnswerStore`: the answers that users gave to questions.

Each answer is stored whole, with its question. So the weights of a user can be estimated again when the experts change.
A user has at most one answer to each question.

Answers are personal data. They are deleted with the user, `expire` deletes old ones, and no error contains their texts.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Row

from personalized_soups.declare.evidence import AnsweredQuestion
from personalized_soups.users.profiles import answer_statements as statements
from personalized_soups.users.profiles.answer_documents import answer_of_document, document_of_answer
from personalized_soups.users.profiles.database import Database
from personalized_soups.users.profiles.failures import AnsweredOtherwise, AnswersChanged, StoreFull, StoreUnavailable
from personalized_soups.users.profiles.names import check_user
from personalized_soups.users.profiles.times import microseconds_of, now, time_of

__all__ = ["AnswerStore", "AnsweredOtherwise", "AnswersChanged"]

_log = logging.getLogger(__name__)

_PAGE = 1000


class AnswerStore:
    """The answers of all users. `ProfileStore.answers` returns it.

    Threads and processes may share a store. Every method can raise the errors that `ProfileStore` lists. A user needs
    no profile to have answers.

    Example:
        >>> from personalized_soups import ProfileStore
        >>> from personalized_soups.declare.evidence import Answer, AnsweredQuestion, Question
        >>> question = Question(id="q1", prompt="How do I clean a lamp?", a="Dust it.", b="Happy to help! Dust it.")
        >>> answered = AnsweredQuestion(question=question, answer=Answer(question="q1", choice="b"))
        >>> with ProfileStore.open("profiles.db") as store:
        ...     num_answers = store.answers.add("ada", answered, expected=0)
        ...     [each.answer.choice for each in store.answers.of("ada")]
        ['b']
    """

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, user: str, answered: AnsweredQuestion, *, expected: int | None = None, replace: bool = False) -> int:
        """Store a user's answer to a question, and return the number of the user's answers.

        If the same answer to the question is stored already, nothing is written, even if `expected` is another number.
        So a caller that does not know whether a call succeeded can repeat it. The times of the answers may differ.

        Args:
            user: the user's name.
            answered: the question with the answer. If the answer has no time, or a time in the future, the current time
                is stored.
            expected: the number of answers that the user must have, to detect that another session has added one in the
                meantime. None does not check the number.
            replace: whether to replace another answer to the same question. The new answer takes its place.

        Raises:
            AnswersChanged: if the user has another number of answers than expected.
            AnsweredOtherwise: if another answer to the question is stored and `replace` is False.
            DeclarationError: if a text of the question contains lone surrogates.
        """
        check_user(user)
        document = document_of_answer(answered)
        question, time = answered.question.id, now()
        if answered.answer.answered_at is not None:
            time = min(time, microseconds_of(answered.answer.answered_at))

        def work(connection: Connection) -> int:
            count, last = connection.execute(statements.COUNT, {"name": user}).one()
            stored = connection.execute(statements.ANSWER_TO, {"name": user, "of": question}).one_or_none()
            if stored is not None and stored.document == document:
                return int(count)
            self._check_count(user, count, expected)
            if stored is None:
                row = {"user": user, "question": question, "number": last + 1, "document": document}
                connection.execute(statements.ADD_ANSWER, {**row, "answered_at": time})
                return int(count) + 1
            if not replace:
                raise AnsweredOtherwise(
                    f"another answer of {user!r} to the question {question!r} is stored",
                    where=self._database.where,
                    mend="keep the stored answer, or replace it (replace=True)",
                )
            new = {"new_document": document, "new_answered_at": time}
            connection.execute(statements.REPLACE_ANSWER, {"name": user, "of": question, **new})
            return int(count)

        return self._database.write(work)

    def of(self, user: str) -> list[AnsweredQuestion]:
        """Return a user's answers in the order in which they were added. Every answer has its time, in UTC."""
        check_user(user)
        with self._database.reading() as connection:
            if not self._database.is_current(connection):
                return []
            rows = connection.execute(statements.ANSWERS, {"name": user}).all()
        return [self._answered(row) for row in rows]

    def count(self, user: str) -> int:
        """Return the number of a user's answers."""
        check_user(user)
        with self._database.reading() as connection:
            if not self._database.is_current(connection):
                return 0
            return int(connection.execute(statements.COUNT, {"name": user}).one()[0])

    def undo(self, user: str, *, expected: int | None = None) -> AnsweredQuestion | None:
        """Delete a user's last answer and return it. Return None if the user has no answers.

        Args:
            user: the user's name.
            expected: see `add`.

        Raises:
            AnswersChanged: if the user has another number of answers than expected.
        """
        check_user(user)

        def work(connection: Connection) -> Row[Any] | None:
            self._check_count(user, connection.execute(statements.COUNT, {"name": user}).one()[0], expected)
            row = connection.execute(statements.LAST_ANSWER, {"name": user}).one_or_none()
            if row is not None:
                connection.execute(statements.DELETE_ANSWER, {"name": user, "of": row.question})
            return row

        row = self._database.write(work)
        return None if row is None else self._answered(row)

    def delete(self, user: str) -> int:
        """Delete a user's answers, and return their number. `ProfileStore.delete` deletes them, too.

        The deleted bytes are overwritten as `ProfileStore.delete` describes.
        """
        check_user(user)
        count = self._database.write(lambda connection: self.delete_rows(connection, user))
        if count:
            self.erase(user)
        return count

    def expire(self, before: datetime) -> int:
        """Delete all answers that were given before a time.

        The deleted bytes are overwritten as `ProfileStore.delete` describes.

        Args:
            before: the time, with a time zone.

        Returns:
            The number of deleted answers.

        Raises:
            ValueError: if `before` has no time zone.
        """
        if before.utcoffset() is None:
            raise ValueError(f"before must have a time zone, but it is {before!r}")
        limit = {"before": microseconds_of(before)}

        def work(connection: Connection) -> tuple[list[str], int]:
            users = list(connection.execute(statements.USERS_BEFORE, limit).scalars())
            if not users:
                return [], 0
            return users, connection.execute(statements.DELETE_ANSWERS_BEFORE, limit).rowcount

        users, count = self._database.write(work)
        if users:
            self.erase(*users)
        return count

    def users(self) -> Iterator[str]:
        """Yield the names of all users who have answers, sorted by code points. Only one page is in memory at a time.

        The store is not locked between two pages, so the result may or may not contain writes during the iteration.
        """
        after = ""
        while True:
            with self._database.reading() as connection:
                if not self._database.is_current(connection):
                    return
                page = list(connection.execute(statements.USERS, {"after": after, "limit": _PAGE}).scalars())
            if not page:
                return
            yield from page
            after = page[-1]

    def delete_rows(self, connection: Connection, user: str) -> int:
        """Delete a user's answers in a transaction of the caller, and return their number.

        The caller must call `erase` after the commit.
        """
        return connection.execute(statements.DELETE_ANSWERS, {"name": user}).rowcount

    def erase(self, *users: str) -> None:
        """Overwrite the bytes of deleted rows. If that is not possible, the rows stay deleted, and the log says so."""
        try:
            self._database.erase(*users)
        except (StoreUnavailable, StoreFull) as error:
            _log.warning("%s: unused space may still contain the deleted bytes: %s", self._database.where, error.what)

    def _check_count(self, user: str, count: int, expected: int | None) -> None:
        if expected is None or expected == count:
            return
        raise AnswersChanged(
            f"{user!r} has {count} answer{'' if count == 1 else 's'}, but {expected} were expected: another session "
            "has changed the answers in the meantime",
            where=self._database.where,
            mend="read the stored answers again and continue from there, or end the other session",
            current=count,
        )

    def _answered(self, row: Row[Any]) -> AnsweredQuestion:
        return answer_of_document(row.user, row.document, time_of(row.answered_at), self._database.where)
