"""`ProfileStore`: every version of each user's profile, read and written by several processes at once.

A write never changes a row; it adds the user's next version. Two writers that saw the same version therefore cannot
both write the next one: the second write fails, or runs again on top of the first.

A version is never used twice for one user, even if the user is deleted and added again, because caches identify a soup
by user and version. The store remembers only the greatest version that was ever deleted, without the user's name; new
users start above it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from types import TracebackType
from typing import Any, Final, Self

from sqlalchemy import Connection, Row

from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import OnBad, SeenUsers
from personalized_soups.errors import DeclarationError, UsageError
from personalized_soups.users.profiles import schema
from personalized_soups.users.profiles.addresses import open_database
from personalized_soups.users.profiles.database import Batch, Database
from personalized_soups.users.profiles.documents import document_of, profile_of
from personalized_soups.users.profiles.failures import StoreFull, StoreUnavailable, UnknownProfile, VersionConflict
from personalized_soups.users.profiles.names import MAX_USER_BYTES, check_unicode, check_user, has_surrogates

__all__ = [
    "ABSENT", "ANY", "MAX_USER_BYTES", "ProfileStore", "StoreFull", "StoreUnavailable", "StoredProfile",
    "UnknownProfile", "VersionConflict", "check_user",
]  # fmt: skip

_log = logging.getLogger(__name__)

# Values of `expected` besides a version: any version or none, and no profile at all.
ANY: Final = None
ABSENT: Final = 0

# How long a writer waits for others; an import of a million profiles holds the lock for less.
PATIENCE_SECONDS = 30.0

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BATCH = 5000
_PAGE = 1000
_ASCII_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """One version of a user's profile.

    Attributes:
        profile: the profile, with its user.
        version: counted up with each write of the user's profile.
        written_at: the time of the write, in UTC.
    """

    profile: Profile
    version: int
    written_at: datetime


class ProfileStore:
    """Profiles by user, in a SQLite file or a PostgreSQL database. Threads and processes may share a store.

    Every method raises StoreUnavailable if the database cannot be reached (a later call may succeed), StoreFull if its
    disk is full, FileFormatError if it is damaged, and DeclarationError if a user's name is invalid (`check_user`).

    Example:
        >>> with ProfileStore.open("profiles.db") as store:
        ...     stored = store.put(Profile(user="ada", weights={"friendly": 0.6}))
        ...     store.get("ada").version
        1
    """

    def __init__(self, database: Database, check: Callable[[Profile], None] | None = None) -> None:
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
            where: a file (SQLite), or a URL: sqlite:///profiles.db, postgresql://user@host/database.
            check: called with every profile before it is written; raises to reject the profile (`library_check`).
            create: whether to create a store that does not exist.
            patience: seconds that a writer waits for other writers.

        Raises:
            UsageError: if the URL is invalid, the file cannot be created, or it does not exist and `create` is False.
            FileFormatError: if the file is not a store, or a newer version of this package wrote it.
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
        """Raise StoreUnavailable if the database cannot be reached; for the readiness probe of a server."""
        with self._database.reading() as connection:
            self._database.check_schema(connection)

    def get(self, user: str, version: int | None = None) -> StoredProfile:
        """Return a user's current profile, or one version of it.

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
        """Write a profile as its user's next version and return that version. An equal profile is not written again.

        Args:
            profile: the profile, with its user.
            expected: the user's current version; ABSENT (0) if the user must not have a profile; ANY (None) to write
                in any case.

        Raises:
            VersionConflict: if the user's current version is not the expected one.
            DeclarationError: if the store's check rejects the profile.
        """
        document = self._checked(profile)

        def work(connection: Connection) -> StoredProfile:
            row = connection.execute(schema.CURRENT, {"user": profile.user}).one_or_none()
            self._check_version(profile.user, None if row is None else row.version, expected)
            if row is not None and row.document == document:
                return StoredProfile(profile, row.version, _time(row.written_at))
            last = connection.execute(schema.RETIRED).scalar_one() if row is None else row.version
            now = _now()
            connection.execute(
                schema.ADD, {"user": profile.user, "version": last + 1, "document": document, "written_at": now}
            )
            return StoredProfile(profile, last + 1, _time(now))

        return self._database.write(work)

    def delete(self, user: str, *, expected: int | None = ANY) -> None:
        """Delete a user with all versions.

        In a SQLite file the deleted bytes are overwritten; PostgreSQL overwrites them at its next vacuum. Copies in the
        file system, in backups or in an archive of the server's log are not touched.

        Raises:
            UnknownProfile: if the user does not exist.
            VersionConflict: if the user's current version is not the expected one.
        """
        check_user(user)

        def work(connection: Connection) -> None:
            row = connection.execute(schema.CURRENT, {"user": user}).one_or_none()
            if row is None and expected is ANY:
                raise self._unknown(user)
            self._check_version(user, None if row is None else row.version, expected)
            if row is None:  # absent as expected
                raise self._unknown(user)
            connection.execute(schema.RETIRE, {"last": row.version})
            connection.execute(schema.DELETE, {"name": user})

        self._database.write(work)
        try:
            self._database.erase(user)
        except (StoreUnavailable, StoreFull) as error:  # the rows are deleted nevertheless
            _log.warning("%s: unused space may still contain the deleted bytes: %s", self._database.where, error.what)

    def page(self, *, after: str = "", limit: int = 100, search: str = "") -> list[StoredProfile]:
        """Return the current profiles of the next users after a name, in the order of code points.

        Args:
            after: the name; an empty name starts with the first user.
            limit: the largest number of profiles to return.
            search: return only users whose name contains this text. ASCII letters match in either case, others only in
                the same case. A search reads the whole store.

        Raises:
            DeclarationError: if `after` is not Unicode text.
        """
        check_unicode(after, "after")
        if "\0" in search or has_surrogates(search):
            return []  # no name contains either
        # PostgreSQL rejects NUL. No name contains NUL, so the names after "a\0b" are the names after "a".
        given: dict[str, Any] = {"after": after.partition("\0")[0], "limit": limit}
        if search:
            given["pattern"] = "%" + re.sub(r"([\\%_])", r"\\\1", search.translate(_ASCII_LOWER)) + "%"
        with self._database.reading() as connection:
            rows = connection.execute(schema.SEARCH if search else schema.PAGE, given).all()
        return [self._stored(row) for row in rows]

    def history(self, user: str) -> list[StoredProfile]:
        """Return all versions of a user's profile, the oldest first.

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
        """Yield the current profile of every user, in the order of names. Only one page is in memory at a time.

        No lock and no connection is held between two pages, so writes during the iteration may or may not appear.
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
        """Write all profiles in one transaction and return the number of new versions.

        A profile that equals the user's current one is not written and not counted. Readers never wait; other writers
        wait from the time when all profiles are read and checked.

        Args:
            profiles: at most one profile for each user; read once. Each takes sixteen bytes of memory.
            on_done: called with the number of valid profiles so far.
            on_bad: called with the error of each invalid profile, which is skipped. If None, the error is raised and
                nothing is written.

        Raises:
            DeclarationError: if the store's check rejects a profile.
            UsageError: if a user has two profiles.
        """
        return self._database.write_staged(
            self._batches(self._documents(profiles, on_bad), on_done),
            lambda connection: connection.execute(schema.ADD_STAGED, {"now": _now()}).rowcount,
        )

    def _documents(self, profiles: Iterable[Profile], on_bad: OnBad | None) -> Iterator[tuple[str, str]]:
        """Yield user and document of every valid profile; a user's second profile is invalid."""
        seen = SeenUsers()
        for profile in profiles:
            try:
                # checked before the user is added: an invalid profile must not block the user's valid one
                document = self._checked(profile)
                seen.add(profile)
            except (DeclarationError, UsageError) as error:
                if on_bad is None:
                    raise
                on_bad(error)
            else:
                yield profile.user, document

    def _batches(self, documents: Iterator[tuple[str, str]], on_done: Callable[[int], None] | None) -> Iterator[Batch]:
        done = 0
        while batch := list(islice(documents, _BATCH)):
            yield batch
            done += len(batch)
            if on_done is not None:
                on_done(done)

    def _checked(self, profile: Profile) -> str:
        """Return the document of a profile that the store accepts."""
        check_user(profile.user, profile.place("user"))
        if self._check is not None:
            self._check(profile)
        return document_of(profile)

    def _stored(self, row: Row[Any]) -> StoredProfile:
        profile = profile_of(row.user, row.version, row.document, self._database.where)
        return StoredProfile(profile, row.version, _time(row.written_at))

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
                mend="list the users with psoups profile list",
            )
        return UnknownProfile(
            f"the profile of {user!r} has no version {version}",
            where=self._database.where,
            mend=f"list the versions with psoups profile history {user!r}",
        )


def _now() -> int:
    return (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
