"""What can go wrong between a store of profiles and its database, told as this project tells errors."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from personalized_soups.errors import FileFormatError, RunError, SoupError, UsageError

# https://www.sqlite.org/rescode.html; the lowest byte of an extended code is its primary code
_PRIMARY = 0xFF
_FULL = frozenset({sqlite3.SQLITE_FULL})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# the statement or its use is wrong: a fault of this program
_OURS = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_INTERNAL})
# the shared memory beside the file could not be made longer: the disk is full
_FULL_EXTENDED = frozenset({sqlite3.SQLITE_IOERR_SHMSIZE})

# https://www.postgresql.org/docs/current/errcodes-appendix.html
CONFLICTS = frozenset({"40001", "40P01", "23505"})  # serialization_failure, deadlock_detected, unique_violation
_LOCKED = frozenset({*CONFLICTS, "55P03"})  # lock_not_available
_NO_TABLE = "42P01"
_NO_RIGHT = "42501"
_DISK_FULL = "53100"


class UnknownProfile(UsageError):  # noqa: N818 # it says what is the case, and callers know it by this name
    """The store has no profile of this user, or not this version of it."""


class VersionConflict(RunError):  # noqa: N818
    """A write expected a version that is not the current one: somebody else has written meanwhile.

    `current` is the version that there is; None where the user has no profile.
    """

    def __init__(self, what: str, *, where: str, mend: str, current: int | None = None) -> None:
        super().__init__(what, where=where, mend=mend)
        self.current = current

    def __reduce__(self) -> tuple[object, ...]:
        """Keep the version across a process border, too."""
        return (_conflict, (self.what, self.where, self.mend, self.current))


class StoreUnavailable(RunError):  # noqa: N818
    """The database cannot be reached or opened, or others had it locked for too long; a later call may do better."""


class StoreFull(RunError):  # noqa: N818
    """The database's disk is full; nothing of the write is left."""


@contextmanager
def told(where: str) -> Iterator[None]:
    """Raise what the database says as an error of this project; what is a fault of the program stays as it is.

    Raises:
        StoreUnavailable: if the database is away, locked or may not be written.
        StoreFull: if its disk is full.
        FileFormatError: if it is damaged, or not a store of profiles.
    """
    try:
        yield
    except PoolTimeoutError as error:
        raise StoreUnavailable(
            "all connections to the database are in use",
            where=where,
            mend="try again; let fewer threads ask at once",
        ) from error
    except DBAPIError as error:
        translated = (
            _of_sqlite(error.orig, where) if isinstance(error.orig, sqlite3.Error) else _of_server(error, where)
        )
        if translated is None:
            raise
        raise translated from error


def sqlstate(error: SQLAlchemyError) -> str | None:
    """Return PostgreSQL's code of an error; None where it has none."""
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def is_busy(error: DBAPIError) -> bool:
    """Return whether SQLite says that another connection has the file locked."""
    return getattr(error.orig, "sqlite_errorcode", 0) & _PRIMARY in _BUSY


def _of_sqlite(error: sqlite3.Error, where: str) -> SoupError | None:
    extended = getattr(error, "sqlite_errorcode", None)
    code = None if extended is None else extended & _PRIMARY
    found: SoupError | None = StoreUnavailable(
        f"the file cannot be used: {error}", where=where, mend="see that it is there, and may be read and written"
    )
    if code in _FULL or extended in _FULL_EXTENDED:
        found = _full(str(error), where)
    elif code in _DAMAGED:
        found = FileFormatError(
            f"the file is damaged, or no SQLite database: {error}",
            where=where,
            mend="restore it from a copy or an export",
        )
    elif code in _BUSY:
        found = _locked(str(error), where)
    elif code == sqlite3.SQLITE_ERROR and "no such table" in str(error):
        found = _no_store(where)
    elif code is None or code in _OURS:
        found = None
    return found


def _of_server(error: DBAPIError, where: str) -> SoupError | None:
    code, words = sqlstate(error), str(error.orig).strip().replace("\n", "; ")
    if code == _DISK_FULL:
        return _full(words, where)
    if code in _LOCKED:
        return _locked(words, where)
    if code == _NO_TABLE:
        return _no_store(where)
    if code == _NO_RIGHT or isinstance(error, OperationalError | InterfaceError | InternalError):
        return StoreUnavailable(
            f"the database does not answer: {words}", where=where, mend="see that it runs and that the URL is right"
        )
    return None


def _full(words: str, where: str) -> StoreFull:
    return StoreFull(
        f"the database's disk is full: {words}", where=where, mend="free some space; nothing of this write is left"
    )


def _locked(words: str, where: str) -> StoreUnavailable:
    return StoreUnavailable(f"other writers were in the way for too long: {words}", where=where, mend="try again")


def _no_store(where: str) -> FileFormatError:
    return FileFormatError(
        "the database holds no store of profiles any more", where=where, mend="restore it, or give another database"
    )


def _conflict(what: str, where: str, mend: str, current: int | None) -> VersionConflict:
    return VersionConflict(what, where=where, mend=mend, current=current)
