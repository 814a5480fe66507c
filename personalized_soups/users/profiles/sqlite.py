"""The database of a profile store in one SQLite file and its write-ahead log."""

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

from sqlalchemy import (
    Connection,
    QueuePool,
    create_engine,
    event,
    inspect,
)
from sqlalchemy.exc import InvalidatePoolError, OperationalError

from personalized_soups.errors import FileFormatError, UsageError
from personalized_soups.users.profiles.database import LOGGING_NAME, Batch, Database
from personalized_soups.users.profiles.failures import StoreUnavailable, is_busy
from personalized_soups.users.profiles.schema import (
    create_tables,
    staged,
    store,
    upgrade_tables,
)
from personalized_soups.users.profiles.sqlite_copies import has_copies
from personalized_soups.users.profiles.sqlite_descriptors import Identity, hold, identity_of, release

T = TypeVar("T")

_log = logging.getLogger(__name__)

# The maximum number of connections. Each thread that uses the store has one connection; further threads wait.
_CONNECTIONS = 16

# After a large import, the write-ahead log is truncated to this size once its content is in the database file.
_LOG_BYTES = 64 << 20

# How often to try to open a connection if the file is replaced while it is opened.
_ATTEMPTS = 5

_PAUSE_SECONDS = 0.01

# If rows of more users than this are deleted at once, the file is rewritten without a search for the users' names.
_SEARCHED_NAMES = 20


class _Connection(sqlite3.Connection):
    """A connection with the identity of its file."""

    file: Identity | None = None


class SqliteDatabase(Database):
    """A database in a SQLite file. Readers never wait. Writers wait for each other.

    A transaction is on the disk when its commit returns. Deleted bytes are overwritten.

    Args:
        path: the path of the file. An open database never creates the file again: if the file is moved away, calls
            raise StoreUnavailable until it is back.
        create: whether to create the file if it does not exist.
        patience: the number of seconds that a writer waits for other writers.
    """

    def __init__(self, path: Path, *, create: bool, patience: float) -> None:
        self._path = path.absolute()
        self._patience = patience
        self._held: set[Identity] = set()
        self._lock = threading.Lock()
        engine = create_engine(
            "sqlite://",
            creator=self._opened,
            poolclass=QueuePool,
            pool_size=_CONNECTIONS,
            hide_parameters=True,  # errors must not contain users' answers
            logging_name=LOGGING_NAME,
        )
        super().__init__(engine, str(path))
        event.listen(engine, "checkout", self._check_file)
        try:
            self._begin(create=create)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close all connections. When the last one closes, SQLite moves the content of the log into the file."""
        super().close()
        while self._held:
            release(self._held.pop())

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction that starts with the write lock, and return the result of `work`."""
        with self.reading() as connection:
            self._upgrade(connection)
            return _locked(connection, work)

    def write_staged(self, batches: Iterable[Batch], work: Callable[[Connection], T]) -> T:
        """Insert the batches into temporary tables without a lock, then run `work` with the write lock."""
        with self.reading() as connection:
            self._upgrade(connection)
            connection.detach()  # closing a connection drops its temporary tables, so the pool must not reuse it
            staged.metadata.create_all(connection, checkfirst=False)
            connection.exec_driver_sql("BEGIN")
            for batch in batches:
                places = ", ".join("?" * len(batch.table.c))
                connection.exec_driver_sql(f"INSERT INTO temp.{batch.table.name} VALUES ({places})", [*batch.rows])
            connection.commit()
            written = _locked(connection, work)
            connection.exec_driver_sql("PRAGMA wal_checkpoint(PASSIVE)")
            return written

    def erase(self, *users: str) -> None:
        """Remove what is left of the users' deleted rows in the log and in unused space of the file.

        The log is emptied into the file. SQLite overwrites deleted rows (secure_delete), but in about one of a hundred
        deletions, a page that was split keeps a copy of a row in unused space. Every row begins with the user's name.
        So this method counts the name in the bytes of the file (0.1 s for a million profiles) and in the remaining
        rows. If the bytes contain the name more often than the rows, the file is rewritten. Long documents count as if
        they did not contain the name, because the name may be split between two pages there. So an occurrence in a long
        document may cause a rewrite that is not needed, but no copy is overlooked.
        """
        with self.reading() as connection:
            if not _checkpointed(connection):
                _log.warning("%s: a reader blocks the log, which still contains the deleted bytes", self.where)
                return
            held = identity_of(self._path)
            if held not in self._held:  # the file was moved away in the meantime
                return
            if len(users) > _SEARCHED_NAMES or any(has_copies(connection, held, user) for user in users):
                connection.exec_driver_sql("VACUUM")
                _checkpointed(connection)

    def _upgrade(self, connection: Connection) -> None:
        if not self.is_current(connection):
            _locked(connection, upgrade_tables)

    def _begin(self, *, create: bool) -> None:
        if not os.path.lexists(self._path):
            self._make(create=create)
        elif os.path.exists(self._path) and not stat.S_ISREG(self._path.stat().st_mode):  # noqa: PTH110
            raise FileFormatError(
                "the path is not a regular file", where=self.where, mend="give a file, such as profiles.db"
            )
        with self.reading() as connection:
            self._prepare(connection, create=create)

    def _make(self, *, create: bool) -> None:
        if not create:
            raise UsageError(
                "the file does not exist",
                where=self.where,
                mend="create the file with `psoups profile set`",
            )
        try:
            # SQLite would create the file with mode 0644 at most. Its log gets the same mode as the file.
            os.close(os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            pass  # another process created the file in the meantime
        except OSError as error:
            raise UsageError(
                f"the file cannot be created: {error.strerror}",
                where=self.where,
                mend="give a path in a folder that exists and that you may write to",
            ) from error

    def _prepare(self, connection: Connection, *, create: bool) -> None:
        tables = inspect(connection).get_table_names()
        if not tables and create:
            self._begin_log(connection)
            _locked(connection, _create_if_empty)
        elif store.name not in tables:
            raise FileFormatError(
                "this database is not a profile store" + (f": it contains the table {tables[0]!r}" if tables else ""),
                where=self.where,
                mend="give the file of a profile store, or the path of a new file",
            )
        self.check_schema(connection)

    def _begin_log(self, connection: Connection) -> None:
        """Switch the file to a write-ahead log. The setting is stored in the file and holds for all processes."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            except OperationalError as error:
                # here, SQLite itself does not wait for other processes that create the same file
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
            isolation_level=None,  # this module starts each transaction with the lock that it needs
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
        """Open a connection and hold a descriptor of its file. Try again if the file was replaced in the meantime."""
        for _ in range(_ATTEMPTS):
            before = identity_of(self._path)
            connection = self._connect()
            if before is not None and self._hold(before):
                connection.file = before
                return connection
            connection.close()
        raise StoreUnavailable(
            f"the file was replaced {_ATTEMPTS} times while it was opened", where=self.where, mend="try again"
        )

    def _hold(self, identity: Identity) -> bool:
        """Hold the file with this identity until `close`. Return whether the path still leads to this file."""
        with self._lock:
            if identity in self._held:
                return identity_of(self._path) == identity
            held = hold(self._path)
            if held == identity:
                self._held.add(identity)
            elif held is not None:
                release(held)
            return held == identity

    def _check_file(self, connection: _Connection, _: object, __: object) -> None:
        """Discard the connection if its file is no longer the file at the path."""
        if connection.file != identity_of(self._path):
            self._is_current = False
            raise InvalidatePoolError


def _locked(connection: Connection, work: Callable[[Connection], T]) -> T:
    # IMMEDIATE takes the lock first. Otherwise, what `work` reads could be outdated when it writes.
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
