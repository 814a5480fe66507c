"""`Database`: the operations that a store needs of SQLite or PostgreSQL."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Connection, Engine, select

from personalized_soups.users.profiles.failures import translated_errors
from personalized_soups.users.profiles.schema import check_schema, store

T = TypeVar("T")

# User and document of each profile in one batch of an import.
Batch = Sequence[tuple[str, str]]


class Database(ABC):
    """A SQLAlchemy engine with its connections. Threads may share a database.

    Args:
        engine: SQLAlchemy's engine.
        where: the database's name in errors, without its password.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine = engine
        self.where = where

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection for single statements. Each statement sees what is committed when it starts.

        Raises:
            StoreUnavailable, StoreFull, FileFormatError: as `translated_errors`.
        """
        with translated_errors(self.where), self.engine.connect() as connection:
            yield connection

    def check_schema(self, connection: Connection) -> None:
        """Raise FileFormatError if this version of the package does not know the schema of the tables."""
        check_schema(connection.execute(select(store.c.schema)).scalar_one(), self.where)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @abstractmethod
    def write(self, work: Callable[[Connection], T]) -> T:
        """Run `work` in one transaction that excludes other writers, and return its result. `work` may run again."""

    @abstractmethod
    def write_staged(self, batches: Iterable[Batch], work: Callable[[Connection], T]) -> T:
        """Fill the temporary table without a lock, then run `work` as `write` does."""

    @abstractmethod
    def erase(self, user: str) -> None:
        """Overwrite the bytes of a deleted user's rows, as far as the database allows."""
