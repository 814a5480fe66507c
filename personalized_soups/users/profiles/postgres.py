"""The database of a profile store on a PostgreSQL server. The driver is psycopg 3."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import URL, BigInteger, Connection, Table, create_engine, inspect
from sqlalchemy.exc import DBAPIError

from personalized_soups.errors import UsageError, check_extra
from personalized_soups.users.profiles.database import LOGGING_NAME, Batch, Database
from personalized_soups.users.profiles.failures import CONFLICTS, sqlstate, translated_errors
from personalized_soups.users.profiles.schema import answers, create_tables, profiles, staged, upgrade_tables

T = TypeVar("T")

# Timeouts for a server that stops answering. The URL may set other values.
_CONNECT_SECONDS = 5
_SILENT_MILLISECONDS = 10_000

# The number of the advisory lock that a process takes to create or upgrade the tables. The number is arbitrary.
_CREATION_LOCK = 0x50534F5550

_FIRST_PAUSE, _LONGEST_PAUSE = 0.002, 0.1


class PostgresDatabase(Database):
    """A database on a PostgreSQL server.

    Writers run in SERIALIZABLE transactions. If a write conflicts with another one, it runs again.

    Args:
        url: the database's URL, with the scheme postgres, postgresql or postgresql+psycopg.
        create: whether to create the tables if they do not exist.
        patience: the number of seconds that a writer waits for other writers.
    """

    def __init__(self, url: URL, *, create: bool, patience: float) -> None:
        check_extra("postgres", "psycopg")
        defaults = {
            "connect_timeout": _CONNECT_SECONDS,
            "tcp_user_timeout": _SILENT_MILLISECONDS,
            "application_name": "psoups",
            "client_encoding": "utf8",
        }
        engine = create_engine(
            url.set(drivername="postgresql+psycopg"),
            connect_args={key: value for key, value in defaults.items() if key not in url.query},
            isolation_level="AUTOCOMMIT",  # a single statement needs no BEGIN
            pool_pre_ping=True,
            hide_parameters=True,  # errors must not contain users' answers
            logging_name=LOGGING_NAME,
        )
        super().__init__(engine, url.render_as_string(hide_password=True))
        self._patience = patience
        self._serializable = engine.execution_options(isolation_level="SERIALIZABLE")
        with self._closed_on_error(), self.reading() as connection:
            self._prepare(connection, create=create)

    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one SERIALIZABLE transaction, and return the result of `work`.

        If the transaction conflicts with another one, `work` runs again. If the connection is lost during the commit,
        the server may or may not have committed the write: read the profile to find out.
        """

        self._upgrade()

        def attempt() -> T:
            with self._serializable.connect() as connection:
                return self._run(connection, work)

        return self._retried(attempt)

    def write_staged(self, batches: Iterable[Batch], work: Callable[[Connection], T]) -> T:
        """Insert the batches into temporary tables, then run `work`. Only other writers wait for `work`."""

        def locked(connection: Connection) -> T:
            # lock before the first read, so that the transaction sees all that other writers have committed
            connection.exec_driver_sql(f"LOCK TABLE {profiles.name}, {answers.name} IN EXCLUSIVE MODE")
            return work(connection)

        self._upgrade()
        with translated_errors(self.where), self._serializable.connect() as connection:
            try:
                staged.metadata.create_all(connection, checkfirst=False)
                for batch in batches:
                    columns = dict(zip(batch.table.c.keys(), map(list, zip(*batch.rows, strict=True)), strict=True))
                    connection.exec_driver_sql(_insertion(batch.table), columns)
                for table in staged.metadata.sorted_tables:
                    connection.exec_driver_sql(f"ANALYZE {table.name}")
                connection.commit()
                return self._retried(lambda: self._run(connection, locked))
            finally:
                connection.invalidate()  # closing the connection drops the temporary tables

    def erase(self, *users: str) -> None:
        """Do nothing: the server's vacuum overwrites dead rows."""

    def _run(self, connection: Connection, work: Callable[[Connection], T]) -> T:
        with connection.begin():
            connection.exec_driver_sql(f"SET LOCAL lock_timeout = {int(self._patience * 1000)}")
            return work(connection)

    def _retried(self, attempt: Callable[[], T]) -> T:
        deadline = time.monotonic() + self._patience
        pause = _FIRST_PAUSE
        with translated_errors(self.where):
            while True:
                try:
                    return attempt()
                except DBAPIError as error:
                    if sqlstate(error) not in CONFLICTS or time.monotonic() > deadline:
                        raise
                time.sleep(random.uniform(0, pause))  # a random pause, so that two writers do not conflict again
                pause = min(2 * pause, _LONGEST_PAUSE)

    def _prepare(self, connection: Connection, *, create: bool) -> None:
        encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
        if encoding != "UTF8":
            raise UsageError(
                f"the database has the encoding {encoding}, but UTF8 was expected",
                where=self.where,
                mend="create the database with UTF8: CREATE DATABASE psoups ENCODING 'UTF8' TEMPLATE template0",
            )
        if not inspect(connection).has_table(profiles.name):
            if not create:
                raise UsageError(
                    "the database contains no profile store",
                    where=self.where,
                    mend="create the store with `psoups profile set`",
                )
            self._create()
        self.check_schema(connection)

    def _create(self) -> None:
        with self._changing_tables() as connection:
            if not inspect(connection).has_table(profiles.name):
                create_tables(connection)

    def _upgrade(self) -> None:
        if self._is_current:
            return
        with self.reading() as connection:
            if self.is_current(connection):
                return
        with translated_errors(self.where), self._changing_tables() as connection:
            upgrade_tables(connection)

    @contextmanager
    def _changing_tables(self) -> Iterator[Connection]:
        """Yield a connection in a transaction that excludes other processes which create or upgrade the tables."""
        with (
            self.engine.connect().execution_options(isolation_level="READ COMMITTED") as connection,
            connection.begin(),
        ):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_CREATION_LOCK})")
            yield connection

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise


def _insertion(table: Table) -> str:
    """Return the statement that inserts rows from one list for each column."""
    lists = (
        f"%({column.name})s::{'bigint' if isinstance(column.type, BigInteger) else 'text'}[]" for column in table.c
    )
    return f"INSERT INTO {table.name} SELECT * FROM unnest({', '.join(lists)})"
