"""Write many profiles and answers in one transaction.

First all lines are read, checked and inserted into temporary tables, without a lock. Then one transaction writes what
differs from the store. So other writers wait only for the second part, and an error in any line leaves nothing written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from sqlalchemy import Connection, Table

from personalized_soups.declare.evidence import UserAnswers
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import OnBad, SeenUsers
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.users.profiles import import_statements as statements
from personalized_soups.users.profiles.answer_documents import document_of_answer
from personalized_soups.users.profiles.database import Batch, Database
from personalized_soups.users.profiles.failures import AnsweredOtherwise
from personalized_soups.users.profiles.names import check_user
from personalized_soups.users.profiles.schema import staged, staged_answers
from personalized_soups.users.profiles.times import microseconds_of, now

_BATCH = 5000


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import read and wrote.

    Attributes:
        num_profiles: the number of valid profiles.
        num_versions: the number of new versions of profiles.
        num_given: the number of answers in valid lines.
        num_answers: the number of new and replaced answers.
    """

    num_profiles: int
    num_versions: int
    num_given: int
    num_answers: int


def write_lines(
    database: Database,
    lines: Iterable[Profile | UserAnswers],
    document_of: Callable[[Profile], str],
    *,
    replace_answers: bool = False,
    on_done: Callable[[int], None] | None = None,
    on_bad: OnBad | None = None,
) -> Imported:
    """Write profiles and answers to a database, all or nothing.

    Args:
        database: the database.
        lines: at most one profile and one line of answers for each user.
        document_of: checks a profile and returns its document.
        replace_answers: see `ProfileStore.put_lines`.
        on_done: see `ProfileStore.put_lines`.
        on_bad: see `ProfileStore.put_lines`.

    Raises:
        AnsweredOtherwise: if the store has another answer to one of the questions, and neither `replace_answers` nor
            `on_bad` is given.
        DeclarationError, UsageError: if a line is invalid and `on_bad` is None.
    """
    given = {staged: 0, staged_answers: 0}
    differing: list[tuple[str, str]] = []

    def work(connection: Connection) -> Imported:
        differing.clear()  # the transaction may run again
        num_versions = connection.execute(statements.ADD_STAGED, {"now": now()}).rowcount
        num_answers = 0
        if replace_answers:
            num_answers += connection.execute(statements.REPLACE_STAGED_ANSWERS).rowcount
        else:
            differing.extend((row.user, row.question) for row in connection.execute(statements.DIFFERING_ANSWERS))
            if differing and on_bad is None:
                raise _otherwise(*differing[0], database.where)
        num_answers += connection.execute(statements.ADD_STAGED_ANSWERS).rowcount
        return Imported(given[staged], num_versions, given[staged_answers], num_answers)

    imported = database.write_staged(_batches(_rows(lines, document_of, on_bad), given, on_done), work)
    if on_bad is not None:
        for user, question in differing:
            on_bad(_otherwise(user, question, database.where))
    return imported


def _rows(
    lines: Iterable[Profile | UserAnswers], document_of: Callable[[Profile], str], on_bad: OnBad | None
) -> Iterator[Batch]:
    """Yield the rows of every valid line. The second profile of a user is not valid, nor are the second answers."""
    with_profiles, with_answers = SeenUsers(), SeenUsers("line of answers", "lines of answers")
    for line in lines:
        try:
            # check before `add`: an invalid line must not block a later valid line of the user
            if isinstance(line, Profile):
                rows = Batch(staged, [(line.user, document_of(line))])
                with_profiles.add(line)
            else:
                rows = Batch(staged_answers, _answer_rows(line))
                with_answers.add(line)
        except (DeclarationError, UsageError) as error:
            if on_bad is None:
                raise
            on_bad(error)
        else:
            yield rows


def _answer_rows(line: UserAnswers) -> list[tuple[Any, ...]]:
    check_user(line.user, line.place("user"))
    latest = now()
    rows: list[tuple[Any, ...]] = []
    for position, answered in enumerate(line.answers, 1):
        given_at = answered.answer.answered_at
        time = latest if given_at is None else min(latest, microseconds_of(given_at))
        rows.append((line.user, answered.question.id, position, document_of_answer(answered), time))
    return rows


def _batches(lines: Iterator[Batch], given: dict[Table, int], on_done: Callable[[int], None] | None) -> Iterator[Batch]:
    """Yield the rows of several lines at once, and count the rows of each table in `given`."""
    done = 0
    while some := list(islice(lines, _BATCH)):
        for table in (staged, staged_answers):
            rows = [row for line in some if line.table is table for row in line.rows]
            if rows:
                given[table] += len(rows)
                yield Batch(table, rows)
        done += len(some)
        if on_done is not None:
            on_done(done)


def _otherwise(user: str, question: str, where: str) -> AnsweredOtherwise:
    return AnsweredOtherwise(
        f"another answer of {user!r} to the question {question!r} is stored",
        where=where,
        mend="remove the answer from the file to keep the stored one, or replace stored answers (replace_answers=True)",
    )
