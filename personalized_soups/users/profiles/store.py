"""Everybody's profiles with all their versions, kept where several processes read and write them at once.

A write never changes a row: it adds the user's next version. So two writers who have seen the same version cannot both
write the next one, whatever happens between them: the second one is told, or run again on what the first one wrote.
A version is never used twice for one user, even where the user is deleted and comes back: caches of soups go by user
and version, and must not take one for another. For that the store keeps one number, the greatest version that was ever
deleted, and new users begin above it; whose it was is not kept.
"""

from __future__ import annotations

import json
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

from pydantic import ValidationError
from sqlalchemy import Connection, Row, make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from personalized_soups.declare.declared import Places
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.profiles import OnBad, SeenUsers
from personalized_soups.errors import DeclarationError, FileFormatError, UsageError
from personalized_soups.users.profiles import schema
from personalized_soups.users.profiles.database import Batch, Database
from personalized_soups.users.profiles.failures import StoreFull, StoreUnavailable, UnknownProfile, VersionConflict
from personalized_soups.users.profiles.postgres import PostgresDatabase
from personalized_soups.users.profiles.sqlite import SqliteDatabase

__all__ = [
    "ABSENT", "ANY", "MAX_USER_BYTES", "ProfileStore", "StoreFull", "StoreUnavailable", "StoredProfile",
    "UnknownProfile", "VersionConflict", "check_user",
]  # fmt: skip

_log = logging.getLogger(__name__)

# What `expected` may say besides a version: whatever is there, or nothing.
ANY: Final = None
ABSENT: Final = 0

MAX_USER_BYTES = 256

# A writer waits so long for others before it gives up: longer than an import of a million profiles keeps it waiting.
PATIENCE_SECONDS = 30.0

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BATCH = 5000
_PAGE = 1000
_ASCII_LOWER = str.maketrans(ascii_uppercase, ascii_lowercase)
_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


@dataclass(frozen=True, slots=True)
class StoredProfile:
    """A profile as it was written: its version, counted up with each write, and when that was (UTC)."""

    profile: Profile
    version: int
    written_at: datetime


class ProfileStore:
    """Profiles by user, in a SQLite file or a PostgreSQL database; safe between threads and processes.

    Every method raises StoreUnavailable where the database is away (a later call finds it again), StoreFull where its
    disk is full, FileFormatError where it is damaged, and DeclarationError where a user's name cannot be kept.
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
        """Open a store, and make it where there is none.

        Args:
            where: a file (SQLite), or a URL: sqlite:///profiles.db, postgresql://user@host/database.
            check: called with every profile before it is written; raises where it is not to be (`library_check`).
            create: False to open only a store that is there.
            patience: seconds that a writer waits for other writers.

        Raises:
            UsageError: if the URL is none of these, the file cannot be made, or there is none and `create` is False.
            FileFormatError: if the file is something else, or written by a newer version of this package.
            StoreUnavailable: if the database cannot be reached.
        """
        if isinstance(where, str) and _URL.match(where):
            return cls(_database_of(where, create=create, patience=patience), check)
        return cls(SqliteDatabase(Path(where), create=create, patience=patience), check)

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
        """Raise what `get` would raise where the database is away; for a server's readiness probe."""
        with self._database.reading() as connection:
            self._database.check_schema(connection)

    def get(self, user: str, version: int | None = None) -> StoredProfile:
        """Return a user's current profile, or that of a version.

        Raises:
            UnknownProfile: if there is none.
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
        """Write a profile as its user's next version, and return it; where nothing differs, nothing is written.

        Args:
            profile: with its user.
            expected: the version that the user must be at; ABSENT (0): the user must not be there; ANY (None).

        Raises:
            VersionConflict: if the user is at another version than expected.
            DeclarationError: if the profile does not stand the store's check.
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
        """Take a user away with all versions. In a SQLite file their bytes are overwritten, too.

        PostgreSQL overwrites them at its next vacuum. What the file system, a copy or an archive of the server's log
        keeps is beyond this.

        Raises:
            UnknownProfile: if there is no such user.
            VersionConflict: if the user is at another version than expected.
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
        except (StoreUnavailable, StoreFull) as error:  # the rows are gone all the same
            _log.warning("%s: what was deleted may stand in unused places yet: %s", self._database.where, error.what)

    def page(self, *, after: str = "", limit: int = 100, search: str = "") -> list[StoredProfile]:
        """Return the current profiles of at most `limit` users, those that come next after a name by code points.

        Args:
            after: the name; the empty one begins with the first user.
            limit: how many at most.
            search: only users whose name contains this text; "a" and "A" are the same, beyond ASCII case counts. The
                whole store is read for it.

        Raises:
            DeclarationError: if `after` is no Unicode text.
        """
        if _holds_surrogates(after):
            raise _no_unicode(after, "after")
        if "\0" in search or _holds_surrogates(search):
            return []  # no name holds them
        # PostgreSQL takes no NUL; what follows "a" and what follows "a", NUL and more is the same, as no name holds NUL
        given: dict[str, Any] = {"after": after.partition("\0")[0], "limit": limit}
        if search:
            given["pattern"] = "%" + re.sub(r"([\\%_])", r"\\\1", search.translate(_ASCII_LOWER)) + "%"
        with self._database.reading() as connection:
            rows = connection.execute(schema.SEARCH if search else schema.PAGE, given).all()
        return [self._stored(row) for row in rows]

    def history(self, user: str) -> list[StoredProfile]:
        """Return all versions of a user's profile, the oldest first.

        Raises:
            UnknownProfile: if there is no such user.
        """
        check_user(user)
        with self._database.reading() as connection:
            rows = connection.execute(schema.HISTORY, {"user": user}).all()
        if not rows:
            raise self._unknown(user)
        return [self._stored(row) for row in rows]

    def all(self) -> Iterator[StoredProfile]:
        """Yield the current profile of every user by name; memory: one page.

        Nothing is locked and no connection is held in between: of what is written meanwhile, some may be among them.
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
        """Write all of these profiles or, where one of them is at fault, none; return how many were written.

        Those that are there already, with nothing different, are not written and not counted. Readers are not kept
        waiting; writers are, once all profiles have been read and checked.

        Args:
            profiles: read once; at most one of each user. Of each, sixteen bytes are kept in memory.
            on_done: called with the number of profiles that have been checked and are no fault.
            on_bad: called with the error of each profile that is at fault: it is passed over, all others are written.

        Raises:
            DeclarationError: if a profile does not stand the store's check.
            UsageError: if two profiles are of one user.
        """
        return self._database.write_staged(
            self._batches(self._documents(profiles, on_bad), on_done),
            lambda connection: connection.execute(schema.ADD_STAGED, {"now": _now()}).rowcount,
        )

    def _documents(self, profiles: Iterable[Profile], on_bad: OnBad | None) -> Iterator[tuple[str, str]]:
        """Yield user and document of every profile that is no fault and the first of its user."""
        seen = SeenUsers()
        for profile in profiles:
            try:
                document = self._checked(profile)  # before it is noted: a bad profile does not take its user's place
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
        """Return the document that is kept of a profile: what differs from the defaults, less the user."""
        check_user(profile.user, profile.place("user"))
        if self._check is not None:
            self._check(profile)
        # JSON that is ASCII: PostgreSQL takes no NUL, and an expert's name may hold one
        document = json.dumps(profile.model_dump(exclude_defaults=True, exclude={"user"}), separators=(",", ":"))
        if _holds_surrogates("".join(profile.weights)):
            raise DeclarationError(
                "an expert's name is no Unicode text: it holds half of a surrogate pair",
                where=profile.place("weights"),
                mend="name the expert as its folder is called",
            )
        return document

    def _stored(self, row: Row[Any]) -> StoredProfile:
        user, version = row.user, row.version
        try:
            # the document is never empty: weights have no default
            profile = Profile.model_validate_json(f'{{"user":{json.dumps(user)},{row.document[1:]}')
        except ValidationError as error:
            raise FileFormatError(
                f"version {version} of {user!r} is no profile: {error.errors()[0]['msg']}",
                where=self._database.where,
                mend="a newer version of personalized_soups may have written it; else restore it from an export",
            ) from error
        where = f"{self._database.where}: {user!r} at version {version}"
        return StoredProfile(profile.with_places(Places(where, {})), version, _time(row.written_at))

    def _check_version(self, user: str, current: int | None, expected: int | None) -> None:
        if expected is ANY or expected == (current or ABSENT):
            return
        found = "has no profile" if current is None else f"is at version {current}"
        wanted = "no profile" if expected == ABSENT else f"version {expected}"
        raise VersionConflict(
            f"{user!r} {found}, and {wanted} was expected",
            where=self._database.where,
            mend="read the profile again, then write what is to follow on it",
            current=current,
        )

    def _unknown(self, user: str, version: int | None = None) -> UnknownProfile:
        if version is None:
            return UnknownProfile(
                f"there is no profile of {user!r}", where=self._database.where, mend="see psoups profile list"
            )
        return UnknownProfile(
            f"there is no version {version} of the profile of {user!r}",
            where=self._database.where,
            mend=f"see psoups profile history {user!r}",
        )


def check_user(user: str, where: str = "user") -> None:
    """Raise if a name cannot be kept.

    Any text is a name: slashes, quotes, line breaks, control characters. It only may not be empty, longer than
    MAX_USER_BYTES in UTF-8, hold NUL (which PostgreSQL has no room for), or halves of surrogate pairs.

    Raises:
        DeclarationError: saying which of these it is.
    """
    if not user:
        raise DeclarationError("the user's name is empty", where=where, mend="give a name, such as u1042")
    if "\0" in user:
        raise DeclarationError(f"the user's name {user[:40]!r} holds NUL", where=where, mend="take it out")
    if _holds_surrogates(user):
        raise _no_unicode(user, where)
    if len(user) * 4 > MAX_USER_BYTES and (size := len(user.encode())) > MAX_USER_BYTES:
        raise DeclarationError(
            f"the user's name {user[:40]!r}... takes {size} bytes, more than {MAX_USER_BYTES}",
            where=where,
            mend="take a shorter name, such as a number or a hash",
        )


def _no_unicode(user: str, where: str) -> DeclarationError:
    return DeclarationError(
        f"the user's name {user[:40]!r} is no Unicode text: it holds half of a surrogate pair",
        where=where,
        mend="decode the name as UTF-8",
    )


def _holds_surrogates(text: str) -> bool:
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _database_of(where: str, *, create: bool, patience: float) -> Database:
    try:
        url = make_url(where)
        backend = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise _bad_url("the URL cannot be read") from None
    if backend in {"postgres", "postgresql"}:
        return PostgresDatabase(url, create=create, patience=patience)
    if backend != "sqlite":
        raise _bad_url(f"{backend!r} is no kind of database that profiles are kept in")
    if url.database in {None, "", ":memory:"}:
        raise _bad_url("a database in memory is no store")
    return SqliteDatabase(Path(str(url.database)), create=create, patience=patience)


def _bad_url(what: str) -> UsageError:  # it may hold a password: it is not told
    return UsageError(
        what, where="the store's URL", mend="give a file, sqlite:///profiles.db or postgresql://user@host/database"
    )


def _now() -> int:
    return (datetime.now(UTC) - _EPOCH) // timedelta(microseconds=1)


def _time(microseconds: int) -> datetime:
    return _EPOCH + timedelta(microseconds=microseconds)
