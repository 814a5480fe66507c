"""A store with the tables of schema 1, as the first version of the package made them."""

from __future__ import annotations

SCHEMA_1 = {
    "sqlite": (
        "CREATE TABLE psoups_profiles (user TEXT NOT NULL, version BIGINT NOT NULL, document TEXT NOT NULL, "
        "written_at BIGINT NOT NULL, PRIMARY KEY (user, version)) WITHOUT ROWID",
        "CREATE TABLE psoups_store (schema BIGINT NOT NULL, retired BIGINT NOT NULL)",
    ),
    "postgresql": (
        'CREATE TABLE psoups_profiles ("user" TEXT COLLATE "C" NOT NULL, version BIGINT NOT NULL, '
        'document TEXT NOT NULL, written_at BIGINT NOT NULL, PRIMARY KEY ("user", version))',
        "CREATE TABLE psoups_store (schema BIGINT NOT NULL, retired BIGINT NOT NULL)",
    ),
}
ROW = """INSERT INTO psoups_profiles VALUES ('ada', 8, '{"weights":{"friendly":0.5}}', 1700000000000000)"""


def make_old_store(where: str) -> None:
    """Make the tables, with version 8 of the profile of ada, where 7 is the greatest version that was deleted."""
    from sqlalchemy import create_engine  # it may be missing, and conftest.py imports this module

    kind = "postgresql" if "://" in where else "sqlite"
    url = where.replace("postgresql://", "postgresql+psycopg://") if "://" in where else f"sqlite:///{where}"
    engine = create_engine(url)
    with engine.begin() as connection:
        for statement in (*SCHEMA_1[kind], "INSERT INTO psoups_store VALUES (1, 7)", ROW):
            connection.exec_driver_sql(statement)
    engine.dispose()
