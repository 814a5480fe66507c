from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.users.profiles.old_schema import make_old_store
from tests.users.profiles.postgres import NOT_INSTALLED, Server, find_programs, running_server

if TYPE_CHECKING:
    # needs SQLAlchemy, which may be missing: pytest imports this file before it can skip a test
    from personalized_soups.users.profiles.store import ProfileStore


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if find_programs() is None:
        terminalreporter.write_line(f"the profile store was tested with SQLite only: {NOT_INSTALLED}")


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """Return a PostgreSQL server of this session's own."""
    from sqlalchemy import create_engine, text

    programs = find_programs()
    if programs is None:
        pytest.skip(NOT_INSTALLED)
    with running_server(programs) as server:
        engine = create_engine(_psycopg(server.url()), isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            # a database that sorts as people do: the store must not
            icu = "LOCALE_PROVIDER icu ICU_LOCALE 'en-US'"
            known = connection.execute(text("SELECT 1 FROM pg_collation WHERE collprovider = 'i' LIMIT 1")).all()
            connection.execute(text(f"CREATE DATABASE psoups TEMPLATE template0 {icu if known else ''}"))
        engine.dispose()
        yield server


@pytest.fixture
def postgres_url(server: Server) -> str:
    """Return the URL of an empty database."""
    from sqlalchemy import create_engine, text

    engine = create_engine(_psycopg(server.url("psoups")), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text("DROP TABLE IF EXISTS psoups_profiles, psoups_store, psoups_answers"))
    engine.dispose()
    return server.url("psoups")


@pytest.fixture(params=["sqlite", "postgresql"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Return a place for a store: each kind of database in turn."""
    if request.param == "sqlite":
        return str(tmp_path / "profiles.db")
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def store(where: str) -> Iterator[ProfileStore]:
    from personalized_soups.users.profiles.store import ProfileStore

    with ProfileStore.open(where) as store:
        yield store


@pytest.fixture
def old_store(where: str) -> str:
    """Return the place of a store as the first version of the package wrote it."""
    make_old_store(where)
    return where


def _psycopg(url: str) -> str:
    return url.replace("postgresql://", "postgresql+psycopg://")
