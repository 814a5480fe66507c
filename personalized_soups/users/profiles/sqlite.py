"""A store of profiles in one SQLite file, with its write-ahead log beside it."""

from __future__ import annotations

import logging
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Connection, QueuePool, bindparam, create_engine, event, func, inspect, literal, select
from sqlalchemy.exc import InvalidatePoolError, OperationalError

from personalized_soups.errors import FileFormatError, UsageError
from personalized_soups.users.profiles.database import Batch, Database
from personalized_soups.users.profiles.failures import StoreUnavailable, is_busy
from personalized_soups.users.profiles.schema import create_tables, profiles, staged, store
from personalized_soups.users.profiles.sqlite_descriptors import Identity, count_bytes, hold, identity_of, release

T = TypeVar("T")

_log = logging.getLogger(__name__)

# Threads that ask at once: each has a connection; more of them wait for one.
_CONNECTIONS = 16

# The log of a large import is cut back to so many bytes once it is in the file.
_LOG_BYTES = 64 << 20

# A connection whose file was exchanged while it was being opened is opened again.
_ATTEMPTS = 5

_PAUSE_SECONDS = 0.01


class _Connection(sqlite3.Connection):
    """A connection that knows which file it has open."""

    file: Identity | None = None


class SqliteDatabase(Database):
    """A file that is made where it is not there; readers never wait, writers wait for each other.

    Every transaction is on the disk when it is committed. What is deleted is overwritten.

    Args:
        path: the file. Once opened it is never made anew: a file that was taken away is missed, not replaced by an
            empty one, and found again when it is back.
        create: make it where it is not there.
        patience: seconds that a writer waits for others.
    """

    def __init__(self, path: Path, *, create: bool, patience: float) -> None:
        self._path = path.absolute()
        self._patience = patience
        self._held: set[Identity] = set()
        self._lock = threading.Lock()
        engine = create_engine("sqlite://", creator=self._opened, poolclass=QueuePool, pool_size=_CONNECTIONS)
        super().__init__(engine, str(path))
        event.listen(engine, "checkout", self._check_file)
        try:
            self._begin(create=create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections; the last one to close brings the log into the file."""
        super().close()
        while self._held:
            release(self._held.pop())

    def write(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns, run in one transaction that has the write lock from its beginning."""
        with self.reading() as connection:
            return _locked(connection, work)

    def write_staged(self, batches: Iterable[Batch], work: Callable[[Connection], T]) -> T:
        """Fill the temporary table, which locks nothing, then run `work` with the write lock."""
        with self.reading() as connection:
            connection.detach()  # the temporary table goes with the connection
            staged.create(connection, checkfirst=False)
            connection.exec_driver_sql("BEGIN")
            for batch in batches:
                connection.exec_driver_sql(f"INSERT INTO temp.{staged.name} VALUES (?, ?)", [*batch])
            connection.commit()
            written = _locked(connection, work)
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            return written

    def erase(self, user: str) -> None:
        """Bring the log into the file and empty it, then see that the file has no copy of the name in unused places.

        SQLite overwrites what is deleted (secure_delete), but now and then a page that was split keeps a copy of a row
        in the space between its rows: about one deletion in a hundred. The file is searched for it (0.1 s for a
        million profiles) and written anew where the rows that are left do not account for what is found.
        """
        with self.reading() as connection:
            if not _checkpointed(connection):
                _log.warning("%s: a reader was in the way; what was deleted stays in the log for now", self.where)
                return
            held = identity_of(self._path)
            if held not in self._held:  # taken away meanwhile
                return
            found = count_bytes(held, user.encode())
            if found and found > connection.execute(_OCCURRENCES, {"name": user}).scalar_one():
                connection.exec_driver_sql("VACUUM")
                _checkpointed(connection)

    def _begin(self, *, create: bool) -> None:
        if not os.path.lexists(self._path):
            self._make(create=create)
        elif os.path.exists(self._path) and not stat.S_ISREG(self._path.stat().st_mode):  # noqa: PTH110
            raise FileFormatError("this is no file", where=self.where, mend="give a file, such as profiles.db")
        with self.reading() as connection:
            self._prepare(connection, create=create)

    def _make(self, *, create: bool) -> None:
        if not create:
            raise UsageError("there is no such file", where=self.where, mend="psoups profile set makes one")
        try:
            # SQLite's own mode is 0644 at most; the log beside it takes the file's mode
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            pass  # made by another process meanwhile
        except OSError as error:
            raise UsageError(
                f"the file cannot be made: {error.strerror}", where=self.where, mend="give a file in a folder of yours"
            ) from error

    def _prepare(self, connection: Connection, *, create: bool) -> None:
        tables = inspect(connection).get_table_names()
        if not tables and create:
            self._begin_log(connection)
            _locked(connection, _create_if_empty)
        elif store.name not in tables:
            raise FileFormatError(
                "this database is not a store of profiles" + (f": it holds {tables[0]!r}" if tables else ""),
                where=self.where,
                mend="give another file, or none: it is made",
            )
        self.check_schema(connection)

    def _begin_log(self, connection: Connection) -> None:
        """Have the file written through a log, from now on and by everybody."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            except OperationalError as error:
                # SQLite does not wait here by itself where others make the same file
                if not is_busy(error) or time.monotonic() > deadline:
                    raise
                time.sleep(_PAUSE_SECONDS)
            else:
                return

    def _connect(self) -> _Connection:
        connection = sqlite3.connect(
            f"{self._path.as_uri()}?mode=rw",
            uri=True,
            timeout=self._patience,
            isolation_level=None,  # transactions begin where this module says so, and with the lock that it says
            check_same_thread=False,
            factory=_Connection,
        )
        try:
            for setting in ("synchronous = FULL", "secure_delete = ON", f"journal_size_limit = {_LOG_BYTES}"):
                connection.execute(f"PRAGMA {setting}").close()
        except BaseException:
            connection.close()
            raise
        return connection

    def _opened(self) -> _Connection:
        """Open the file and hold it; again where another file took its name meanwhile."""
        for _ in range(_ATTEMPTS):
            before = identity_of(self._path)
            connection = self._connect()
            if before is not None and self._hold(before):
                connection.file = before
                return connection
            connection.close()
        raise StoreUnavailable("another file takes its name again and again", where=self.where, mend="try again")

    def _hold(self, identity: Identity) -> bool:
        """Keep the file until `close`; return whether the path names it still."""
        with self._lock:
            if identity in self._held:
                return identity_of(self._path) == identity
            found = hold(self._path)
            if found == identity:
                self._held.add(identity)
            elif found is not None:
                release(found)
            return found == identity

    def _check_file(self, connection: _Connection, _: object, __: object) -> None:
        """Let go of connections whose file is no longer the one of that name."""
        if connection.file != identity_of(self._path):
            raise InvalidatePoolError


# How often a name stands in the rows that there are: within longer names, and within names of experts.
_OCCURRENCES = select(
    func.coalesce(
        func.sum(
            (func.length(profiles.c.user) - func.length(func.replace(profiles.c.user, bindparam("name"), "")))
            + (func.length(profiles.c.document) - func.length(func.replace(profiles.c.document, bindparam("name"), "")))
        )
        / func.length(bindparam("name")),
        literal(0),
    )
)


def _locked(connection: Connection, work: Callable[[Connection], T]) -> T:
    # IMMEDIATE: a transaction that reads first and locks later could lose what it read to another writer
    connection.exec_driver_sql("BEGIN IMMEDIATE")
    try:
        result = work(connection)
    except BaseException:
        connection.rollback()
        raise
    connection.commit()
    return result


def _create_if_empty(connection: Connection) -> None:
    if not inspect(connection).get_table_names():
        create_tables(connection)


def _checkpointed(connection: Connection) -> bool:
    return bool(connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)").one()[0] == 0)
