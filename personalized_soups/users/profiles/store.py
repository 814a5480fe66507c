"""`ProfileStore`: all versions of each user's profile. Several processes can use a store at once.

A write adds the user's next version as a new row and never changes a row. So if two writers saw the same version, only
one of them can write the next version. The other write fails, or runs again after the first.

Caches identify a soup (the weighted sum of experts that a profile describes) by user and version. Therefore, a version
is never used twice for one user, even if the user is deleted and added again. To ensure this, the store keeps the
greatest version that was ever deleted, but not the user's name. The versions of new users start above this number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, Row

from personalized_soups.declare.evidence import UserAnswers
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import OnBad
from personalized_soups.users.profiles import schema
from personalized_soups.users.profiles.addresses import open_database
from personalized_soups.users.profiles.answers import AnswerStore
from personalized_soups.users.profiles.database import Database
from personalized_soups.users.profiles.documents import document_of, profile_of
from personalized_soups.users.profiles.failures import StoreFull, StoreUnavailable, UnknownProfile, VersionConflict
from personalized_soups.users.profiles.imports import Imported, write_lines
from personalized_soups.users.profiles.names import MAX_USER_BYTES, check_unicode, check_user, has_surrogates
from personalized_soups.users.profiles.times import now, time_of

__all__ = [
    "ABSENT", "ANY", "MAX_USER_BYTES", "Deletion", "Imported", "ProfileStore", "StoreFull", "StoreUnavailable",
    "StoredProfile", "UnknownProfile", "VersionConflict", "check_user",
]  # fmt: skip

# Values of `expected` besides a version. ANY: do not check. ABSENT: the user must not have a profile.
ANY: Final = None
ABSENT: Final = 0

# The time that a writer waits for other writers. An import of a million profiles holds the lock for less time.
PATIENCE_SECONDS = 30.0

_PAGE = 1000
_ASCII_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """One version of a user's profile.

    Attributes:
        profile: the profile, with its user.
        version: the number of this version. Each write of the user's profile gets the next number.
        written_at: the time when the version was written, in UTC.
    """

    profile: Profile
    version: int
    written_at: datetime


@dataclass(frozen=True, slots=True)
class Deletion:
    """What the deletion of a user removed.

    Attributes:
        num_versions: the number of versions of the profile.
        num_answers: the number of answers to questions.
    """

    num_versions: int
    num_answers: int


class ProfileStore:
    """The profiles of all users, in a SQLite file or a PostgreSQL database. Threads and processes may share a store.

    Attributes:
        answers: the users' answers to questions, from which weights are estimated.

    Every method can raise these errors:

    - StoreUnavailable: the database cannot be reached. A later call may succeed.
    - StoreFull: the disk of the database is full.
    - FileFormatError: the database is damaged.
    - DeclarationError: the name of a user is not valid (`check_user`).

    Example:
        >>> with ProfileStore.open("profiles.db") as store:
        ...     stored = store.put(Profile(user="ada", weights={"friendly": 0.6}))
        ...     store.get("ada").version
        1
    """

    def __init__(self, database: Database, check: Callable[[Profile], None] | None = None) -> None:
        self.answers = AnswerStore(database)
        self._database = database
        self._check = check

    @classmethod
    def open(
        cls,
        where: str | Path,
        *,
        check: Callable[[Profile], None] | None = None,
        create: bool = True,
        patience: float = PATIENCE_SECONDS,
    ) -> Self:
        """Open a store, and create it if it does not exist.

        Args:
            where: the path of a SQLite file, or a URL: sqlite:///profiles.db, postgresql://user@host/database.
            check: a function that is called with every profile before it is written. It raises an error to reject the
                profile; see `library_check`.
            create: whether to create a store that does not exist.
            patience: the number of seconds that a writer waits for other writers.

        Raises:
            UsageError: if the URL is not valid, if the file cannot be created, or if the store does not exist and
                `create` is False.
            FileFormatError: if the file is not a profile store, or if this version of the package does not support the
                store's schema.
            StoreUnavailable: if the database cannot be reached.
        """
        return cls(open_database(where, create=create, patience=patience), check)

    def close(self) -> None:
        """Close all connections."""
        self._database.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_reachable(self) -> None:
        """Raise StoreUnavailable if the database cannot be reached. A server's readiness probe calls this."""
        with self._database.reading() as connection:
            self._database.check_schema(connection)

    def get(self, user: str, version: int | None = None) -> StoredProfile:
        """Return one version of a user's profile.

        Args:
            user: the user's name.
            version: the version; None for the current one.

        Raises:
            UnknownProfile: if the user or the version does not exist.
        """
        check_user(user)
        with self._database.reading() as connection:
            if version is None:
                row = connection.execute(schema.CURRENT, {"user": user}).one_or_none()
            else:
                row = connection.execute(schema.OF_VERSION, {"user": user, "version": version}).one_or_none()
        if row is None:
            raise self._unknown(user, version)
        return self._stored(row)

    def put(self, profile: Profile, *, expected: int | None = ANY) -> StoredProfile:
        """Write a profile as its user's next version, and return that version.

        If the profile equals the user's current profile, nothing is written and the current version is returned.

        Args:
            profile: the profile, with its user.
            expected: the version that must be the user's current one. ABSENT (0) means that the user must not have a
                profile. ANY (None) means that the current version is not checked.

        Raises:
            VersionConflict: if the user's current version is not the expected one.
            DeclarationError: if the store's check rejects the profile.
        """
        document = self._checked(profile)

        def work(connection: Connection) -> StoredProfile:
            row = connection.execute(schema.CURRENT, {"user": profile.user}).one_or_none()
            self._check_version(profile.user, None if row is None else row.version, expected)
            if row is not None and row.document == document:
                return StoredProfile(profile, row.version, time_of(row.written_at))
            last = connection.execute(schema.RETIRED).scalar_one() if row is None else row.version
            written_at = now()
            connection.execute(
                schema.ADD, {"user": profile.user, "version": last + 1, "document": document, "written_at": written_at}
            )
            return StoredProfile(profile, last + 1, time_of(written_at))

        return self._database.write(work)

    def delete(self, user: str, *, expected: int | None = ANY) -> Deletion:
        """Delete all versions of a user's profile, and the user's answers and session. Return what was deleted.

        A user who has answers but no profile can be deleted, too.

        In a SQLite file, the deleted bytes are overwritten at once. PostgreSQL overwrites them at its next vacuum.
        Copies in snapshots of the file system, in backups or in an archive of the server's log remain.

        Args:
            user: the user's name.
            expected: see `put`.

        Raises:
            UnknownProfile: if the store has neither a profile nor answers of the user.
            VersionConflict: if the user's current version is not the expected one.
        """
        check_user(user)

        def work(connection: Connection) -> Deletion:
            row = connection.execute(schema.CURRENT, {"user": user}).one_or_none()
            self._check_version(user, None if row is None else row.version, expected)
            num_versions = 0
            if row is not None:
                connection.execute(schema.RETIRE, {"last": row.version})
                num_versions = connection.execute(schema.DELETE, {"name": user}).rowcount
            num_answers = self.answers.delete_rows(connection, user)
            if not (num_versions or num_answers):
                raise self._unknown(user)
            return Deletion(num_versions, num_answers)

        deletion = self._database.write(work)
        self.answers.erase(user)
        return deletion

    def page(self, *, after: str = "", limit: int = 100, search: str = "") -> list[StoredProfile]:
        """Return one page of the current profiles, sorted by the users' names in the order of code points.

        Args:
            after: the page starts with the first user after this name. If it is empty, the page starts with the first
                user.
            limit: the maximum number of profiles on the page.
            search: return only users whose name contains this text. The case of ASCII letters is ignored; other letters
                match only in the same case. A search reads the whole store.

        Raises:
            DeclarationError: if `after` is not Unicode text.
        """
        check_unicode(after, "after")
        if "\0" in search or has_surrogates(search):
            return []  # no name contains NUL or lone surrogates
        # PostgreSQL rejects NUL. No name contains NUL, so the names after "a\0b" are the names after "a".
        given: dict[str, Any] = {"after": after.partition("\0")[0], "limit": limit}
        if search:
            given["pattern"] = "%" + re.sub(r"([\\%_])", r"\\\1", search.translate(_ASCII_LOWER)) + "%"
        with self._database.reading() as connection:
            rows = connection.execute(schema.SEARCH if search else schema.PAGE, given).all()
        return [self._stored(row) for row in rows]

    def history(self, user: str) -> list[StoredProfile]:
        """Return all versions of a user's profile, with the oldest version first.

        Raises:
            UnknownProfile: if the user does not exist.
        """
        check_user(user)
        with self._database.reading() as connection:
            rows = connection.execute(schema.HISTORY, {"user": user}).all()
        if not rows:
            raise self._unknown(user)
        return [self._stored(row) for row in rows]

    def all(self) -> Iterator[StoredProfile]:
        """Yield the current profile of every user, sorted by the users' names. Only one page is in memory at a time.

        The store is not locked between two pages, so the result may or may not contain writes during the iteration.
        """
        after = ""
        while page := self.page(after=after, limit=_PAGE):
            yield from page
            after = page[-1].profile.user

    def put_many(
        self,
        profiles: Iterable[Profile],
        *,
        on_done: Callable[[int], None] | None = None,
        on_bad: OnBad | None = None,
    ) -> int:
        """Write all profiles in one transaction, and return the number of new versions.

        A profile that equals the user's current profile is not written and not counted. First all profiles are read and
        checked; other writers wait only after that. Readers never wait.

        Args:
            profiles: at most one profile for each user. The iterable is read once. For each profile, sixteen bytes stay
                in memory.
            on_done: a function that is called with the number of valid profiles so far.
            on_bad: a function that is called with the error of each invalid profile. Invalid profiles are skipped. If
                None, the error is raised and nothing is written.

        Raises:
            DeclarationError: if the store's check rejects a profile and `on_bad` is None.
            UsageError: if a user has two profiles and `on_bad` is None.
        """
        return self.put_lines(profiles, on_done=on_done, on_bad=on_bad).num_versions

    def put_lines(
        self,
        lines: Iterable[Profile | UserAnswers],
        *,
        replace_answers: bool = False,
        on_done: Callable[[int], None] | None = None,
        on_bad: OnBad | None = None,
    ) -> Imported:
        """Write profiles and users' answers in one transaction, as `put_many` writes profiles.

        New answers follow the stored answers of the user. An answer that is stored already is not written and not
        counted.

        Args:
            lines: at most one profile and one line of answers for each user. The iterable is read once.
            replace_answers: whether to replace other answers to the same questions. A replaced answer keeps its place.
            on_done: a function that is called with the number of valid lines so far.
            on_bad: see `put_many`. It is also called for each answer to a question that the user has answered
                otherwise. That answer is skipped.

        Raises:
            AnsweredOtherwise: if the store has another answer to a question, and neither `replace_answers` nor `on_bad`
                is given.
            DeclarationError: see `put_many`.
            UsageError: if a user has two profiles or two lines of answers, and `on_bad` is None.
        """
        return write_lines(
            self._database, lines, self._checked, replace_answers=replace_answers, on_done=on_done, on_bad=on_bad
        )

    def _checked(self, profile: Profile) -> str:
        """Check a profile, and return its document."""
        check_user(profile.user, profile.place("user"))
        if self._check is not None:
            self._check(profile)
        return document_of(profile)

    def _stored(self, row: Row[Any]) -> StoredProfile:
        profile = profile_of(row.user, row.version, row.document, self._database.where)
        return StoredProfile(profile, row.version, time_of(row.written_at))

    def _check_version(self, user: str, current: int | None, expected: int | None) -> None:
        if expected is ANY or expected == (current or ABSENT):
            return
        state = "has no profile" if current is None else f"is at version {current}"
        wanted = "no profile" if expected == ABSENT else f"version {expected}"
        raise VersionConflict(
            f"{user!r} {state}, but {wanted} was expected",
            where=self._database.where,
            mend="read the current profile, then write your change on top of it",
            current=current,
        )

    def _unknown(self, user: str, version: int | None = None) -> UnknownProfile:
        if version is None:
            return UnknownProfile(
                f"no profile of {user!r} is stored",
                where=self._database.where,
                mend="list the users: psoups profile list",
            )
        return UnknownProfile(
            f"the profile of {user!r} has no version {version}",
            where=self._database.where,
            mend=f"list the versions: psoups profile history {user!r}",
        )
