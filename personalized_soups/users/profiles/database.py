"""What a store asks of its database, whichever it is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from sqlalchemy import Connection, Engine, select

from personalized_soups.users.profiles.failures import told
from personalized_soups.users.profiles.schema import check_schema, store

T = TypeVar("T")

# User and document of profiles that come together.
Batch = Sequence[tuple[str, str]]


class Database(ABC):
    """An engine with its connections; safe between threads.

    Args:
        engine: SQLAlchemy's.
        where: how errors name it; never with a password.
    """

    def __init__(self, engine: Engine, where: str) -> None:
        self.engine = engine
        self.where = where

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Yield a connection for single statements, each of which sees what is committed when it begins.

        Raises:
            StoreUnavailable, StoreFull, FileFormatError: as `told` does.
        """
        with told(self.where), self.engine.connect() as connection:
            yield connection

    def check_schema(self, connection: Connection) -> None:
        """Raise FileFormatError if the tables are of another schema than this version knows."""
        check_schema(connection.execute(select(store.c.schema)).scalar_one(), self.where)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @abstractmethod
    def write(self, work: Callable[[Connection], T]) -> T:
        """Return what `work` returns, run in one transaction beside which no other writes; it may be run again."""

    @abstractmethod
    def write_staged(self, batches: Iterable[Batch], work: Callable[[Connection], T]) -> T:
        """Fill the temporary table without keeping anybody waiting, then do as `write` does."""

    @abstractmethod
    def erase(self, user: str) -> None:
        """Overwrite what a deletion has left of a user's rows, as far as the database lets us."""
