"""Addresses of profile stores. An address is the path of a SQLite file or the URL of a database."""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError, NoSuchModuleError

from personalized_soups.errors import UsageError
from personalized_soups.users.profiles.database import Database
from personalized_soups.users.profiles.postgres import PostgresDatabase
from personalized_soups.users.profiles.sqlite import SqliteDatabase

_URL = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*://")


def open_database(where: str | Path, *, create: bool, patience: float) -> Database:
    """Open the database at a path or a URL.

    Args:
        where: the path of a SQLite file, or a URL: sqlite:///profiles.db, postgresql://user@host/database.
        create: whether to create the store if it does not exist.
        patience: the number of seconds that a writer waits for other writers.

    Raises:
        UsageError: if the URL is not valid, or if its database is neither SQLite nor PostgreSQL.
    """
    if not isinstance(where, str) or not _URL.match(where):
        return SqliteDatabase(Path(where), create=create, patience=patience)
    try:
        url = make_url(where)
        backend = url.get_backend_name()
    except (ArgumentError, NoSuchModuleError, ValueError):
        raise _bad_url("the URL is not valid") from None
    if backend in {"postgres", "postgresql"}:
        return PostgresDatabase(url, create=create, patience=patience)
    if backend != "sqlite":
        raise _bad_url(f"profiles cannot be stored in {backend!r}, only in SQLite or PostgreSQL")
    if url.database in {None, "", ":memory:"}:
        raise _bad_url("a SQLite database in memory cannot be a profile store")
    return SqliteDatabase(Path(str(url.database)), create=create, patience=patience)


def _bad_url(what: str) -> UsageError:  # does not show the URL, because it may contain a password
    return UsageError(
        what, where="the store's URL", mend="give a path, sqlite:///profiles.db or postgresql://user@host/database"
    )
