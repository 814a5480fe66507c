"""The errors of a profile store, and the conversion of database errors to them."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from personalized_soups.errors import FileFormatError, RunError, SoupError, UsageError

# https://www.sqlite.org/rescode.html: the lowest byte of an extended code is its primary code.
_PRIMARY = 0xFF
_FULL = frozenset({sqlite3.SQLITE_FULL})
_DAMAGED = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
_BUSY = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED})
# The statement or its use is wrong, which is a bug of this package.
_OURS = frozenset({sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISUSE, sqlite3.SQLITE_INTERNAL})
# The shared-memory file could not grow, because the disk is full.
_FULL_EXTENDED = frozenset({sqlite3.SQLITE_IOERR_SHMSIZE})

# https://www.postgresql.org/docs/current/errcodes-appendix.html
CONFLICTS = frozenset({"40001", "40P01", "23505"})  # serialization_failure, deadlock_detected, unique_violation
_LOCKED = frozenset({*CONFLICTS, "55P03"})  # lock_not_available
_NO_TABLE = "42P01"
_NO_RIGHT = "42501"
_DISK_FULL = "53100"


class UnknownProfile(UsageError):  # noqa: N818 # the name states the condition
    """The store has no profile of the user, or the user's profile does not have the given version."""


class VersionConflict(RunError):  # noqa: N818
    """A write expected a version of the profile that is not the current one. Usually another write came first.

    Attributes:
        current: the current version, or None if the user has no profile.
    """

    def __init__(self, what: str, *, where: str, mend: str, current: int | None = None) -> None:
        super().__init__(what, where=where, mend=mend)
        self.current = current

    def __reduce__(self) -> tuple[object, ...]:
        """Keep `current` when the error is pickled."""
        return (_conflict, (self.what, self.where, self.mend, self.current))


class AnswersChanged(RunError):  # noqa: N818
    """A write expected another number of the user's answers. Usually another session added an answer first.

    Attributes:
        current: the current number of the user's answers.
    """

    def __init__(self, what: str, *, where: str, mend: str, current: int) -> None:
        super().__init__(what, where=where, mend=mend)
        self.current = current

    def __reduce__(self) -> tuple[object, ...]:
        """Keep `current` when the error is pickled."""
        return (_changed, (self.what, self.where, self.mend, self.current))


class AnsweredOtherwise(RunError):  # noqa: N818
    """Another answer of the user to the same question is stored."""


class StoreUnavailable(RunError):  # noqa: N818
    """The database cannot be opened, does not answer, or was locked for too long. A later call may succeed."""


class StoreFull(RunError):  # noqa: N818
    """The disk of the database is full. The write was undone."""


@contextmanager
def translated_errors(where: str) -> Iterator[None]:
    """Convert errors of the database in the `with` block to errors of the store.

    Errors that show a bug of this package are not converted.

    Args:
        where: the database's name in errors.

    Raises:
        StoreUnavailable: if the database cannot be reached, is locked, or is read-only.
        StoreFull: if the disk of the database is full.
        FileFormatError: if the database is damaged, or is not a profile store.
    """
    try:
        yield
    except PoolTimeoutError as error:
        raise StoreUnavailable(
            "all connections to the database are in use",
            where=where,
            mend="try again, or use fewer threads at once",
        ) from error
    except DBAPIError as error:
        translated = (
            _of_sqlite(error.orig, where) if isinstance(error.orig, sqlite3.Error) else _of_server(error, where)
        )
        if translated is None:
            raise
        raise translated from error


def sqlstate(error: SQLAlchemyError) -> str | None:
    """Return PostgreSQL's code for an error, or None if the error has no code."""
    return getattr(getattr(error, "orig", None), "sqlstate", None)


def is_busy(error: DBAPIError) -> bool:
    """Return whether SQLite failed because another connection holds a lock."""
    return getattr(error.orig, "sqlite_errorcode", 0) & _PRIMARY in _BUSY


def _of_sqlite(error: sqlite3.Error, where: str) -> SoupError | None:
    extended = getattr(error, "sqlite_errorcode", None)
    code = None if extended is None else extended & _PRIMARY
    translated: SoupError | None = StoreUnavailable(
        f"the file cannot be used: {error}",
        where=where,
        mend="check that the file exists and that you may read and write it",
    )
    if code in _FULL or extended in _FULL_EXTENDED:
        translated = _full(str(error), where)
    elif code in _DAMAGED:
        translated = FileFormatError(
            f"the file is damaged, or is not a SQLite database: {error}",
            where=where,
            mend="restore the file from a backup or an export",
        )
    elif code in _BUSY:
        translated = _locked(str(error), where)
    elif code == sqlite3.SQLITE_ERROR and "no such table" in str(error):
        translated = _no_store(where)
    elif code is None or code in _OURS:
        translated = None
    return translated


def _of_server(error: DBAPIError, where: str) -> SoupError | None:
    code, words = sqlstate(error), str(error.orig).strip().replace("\n", "; ")
    if code == _DISK_FULL:
        return _full(words, where)
    if code in _LOCKED:
        return _locked(words, where)
    if code == _NO_TABLE:
        return _no_store(where)
    if code == _NO_RIGHT:
        return StoreUnavailable(
            f"the database refuses this to the role in the URL: {words}",
            where=where,
            mend="grant the role the right, or use the role that owns the tables; only the owner can upgrade them",
        )
    if isinstance(error, OperationalError | InterfaceError | InternalError):
        return StoreUnavailable(
            f"the database does not answer: {words}",
            where=where,
            mend="check that the server runs and that the URL is right",
        )
    return None


def _full(words: str, where: str) -> StoreFull:
    return StoreFull(f"the database's disk is full: {words}", where=where, mend="free some space; the write was undone")


def _locked(words: str, where: str) -> StoreUnavailable:
    return StoreUnavailable(f"other writers held the lock for too long: {words}", where=where, mend="try again")


def _no_store(where: str) -> FileFormatError:
    return FileFormatError(
        "the database no longer contains a profile store",
        where=where,
        mend="restore the database from a backup, or use another database",
    )


def _conflict(what: str, where: str, mend: str, current: int | None) -> VersionConflict:
    return VersionConflict(what, where=where, mend=mend, current=current)


def _changed(what: str, where: str, mend: str, current: int) -> AnswersChanged:
    return AnswersChanged(what, where=where, mend=mend, current=current)
