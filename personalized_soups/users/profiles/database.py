"""`Database`: the interface of a profile store to SQLite or PostgreSQL."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, Table, select

from personalized_soups.users.profiles.failures import translated_errors
from personalized_soups.users.profiles.schema import SCHEMA, check_schema, store

T = TypeVar("T")

# The part of the loggers' names that belongs to the engines of this package. At the level DEBUG, SQLAlchemy would log
# all rows that it reads, with users' answers.
LOGGING_NAME = "psoups"
logging.getLogger(f"sqlalchemy.engine.Engine.{LOGGING_NAME}").setLevel(logging.WARNING)


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of an import.

    Attributes:
        table: the temporary table for the rows.
        rows: the rows, with a value for each column of the table.
    """

    table: Table
    rows: Sequence[tuple[Any, ...]]


class Database(ABC):
    """A database with the tables of a profile store. Several threads may use a `Database` at once.

    Args:
        engine: the SQLAlchemy engine, which opens the connections.
        where: the database's name in errors, without a password.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine = engine
        self.where = where
        self._is_current = False

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection for single statements. Each statement sees what was committed before its start.

        Raises:
            StoreUnavailable, StoreFull, FileFormatError: see `translated_errors`.
        """
        with translated_errors(self.where), self.engine.connect() as connection:
            yield connection

    def check_schema(self, connection: Connection) -> None:
        """Raise FileFormatError if this version of the package does not support the schema of the tables."""
        version = connection.execute(select(store.c.schema)).scalar_one()
        check_schema(version, self.where)
        self._is_current = version == SCHEMA

    def is_current(self, connection: Connection) -> bool:
        """Return whether the store has the current schema. A store of schema 1 has no table of answers.

        Raises:
            FileFormatError: if this version of the package does not support the schema.
        """
        if not self._is_current:  # another process may have upgraded the store in the meantime
            self.check_schema(connection)
        return self._is_current

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @abstractmethod
    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction that excludes other writers, and return the result of `work`.

        After a conflict with another writer, `work` may run again. A store of schema 1 is upgraded before.
        """

    @abstractmethod
    def write_staged(self, batches: Iterable[Batch], work: Callable[[Connection], T]) -> T:
        """Insert the batches into temporary tables without a lock, then run `work` as `write` does."""

    @abstractmethod
    def erase(self, *users: str) -> None:
        """Overwrite the bytes of the users' deleted rows, as far as the database allows."""
