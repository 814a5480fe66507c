"""The tables of a profile store, and the SQL statements that use the profiles."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    MetaData,
    Table,
    Text,
    bindparam,
    delete,
    func,
    insert,
    select,
    update,
)

from personalized_soups.errors import FileFormatError

# A store of schema 1 has no table of answers. The first write upgrades it.
SCHEMA = 2

_metadata = MetaData()

# Users are sorted by code points, which is SQLite's default and the collation "C" of PostgreSQL.
_NAME = Text().with_variant(Text(collation="C"), "postgresql")

# A write adds a row and never changes a row. If two writers saw the same version, both add the same primary key, so one
# of them fails.
profiles = Table(
    "psoups_profiles",
    _metadata,
    Column("user", _NAME, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("document", Text, nullable=False),  # JSON in ASCII: the profile without its user
    Column("written_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
    sqlite_with_rowid=False,
)

# A user's answers to questions. Two answers to one question have the same primary key.
answers = Table(
    "psoups_answers",
    _metadata,
    Column("user", _NAME, primary_key=True),
    Column("question", _NAME, primary_key=True),
    Column("number", BigInteger, nullable=False),  # the order of a user's answers
    Column("document", Text, nullable=False),  # JSON in ASCII: the question and its answer, without the time
    Column("answered_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
    sqlite_with_rowid=False,
)

# This table has one row: the version of the schema, and the greatest version of all deleted profiles. The names of
# deleted users are not kept.
store = Table(
    "psoups_store",
    _metadata,
    Column("schema", BigInteger, nullable=False),
    Column("retired", BigInteger, nullable=False),
)

# The profiles and answers that an import has read so far. Only the connection of the import sees these tables.
staged = Table(
    "psoups_staged",
    MetaData(),
    Column("user", _NAME, nullable=False),
    Column("document", Text, nullable=False),
    prefixes=["TEMPORARY"],
)

staged_answers = Table(
    "psoups_staged_answers",
    staged.metadata,
    Column("user", _NAME, nullable=False),
    Column("question", _NAME, nullable=False),
    Column("position", BigInteger, nullable=False),  # the order of a user's answers
    Column("document", Text, nullable=False),
    Column("answered_at", BigInteger, nullable=False),
    prefixes=["TEMPORARY"],
)

_later = profiles.alias("later")
_last_version = select(func.max(_later.c.version)).where(_later.c.user == profiles.c.user).scalar_subquery()

CURRENT = select(profiles).where(profiles.c.user == bindparam("user")).order_by(profiles.c.version.desc()).limit(1)
OF_VERSION = select(profiles).where(profiles.c.user == bindparam("user"), profiles.c.version == bindparam("version"))
HISTORY = select(profiles).where(profiles.c.user == bindparam("user")).order_by(profiles.c.version)
PAGE = (
    select(profiles)
    .where(profiles.c.user > bindparam("after"), profiles.c.version == _last_version)
    .order_by(profiles.c.user)
    .limit(bindparam("limit"))
)
# `pattern` is in lower case. lower() changes only ASCII letters, in PostgreSQL because of the collation "C".
SEARCH = PAGE.where(func.lower(profiles.c.user).like(bindparam("pattern"), escape="\\"))
RETIRED = select(store.c.retired)
ADD = insert(profiles)
DELETE = delete(profiles).where(profiles.c.user == bindparam("name"))
RETIRE = update(store).where(store.c.retired < bindparam("last")).values(retired=bindparam("last"))


def create_tables(connection: Connection) -> None:
    """Create the tables. The caller must hold a lock and must have checked that the tables do not exist."""
    _metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(store).values(schema=SCHEMA, retired=0))


def upgrade_tables(connection: Connection) -> None:
    """Add the table that a store of schema 1 lacks. The caller must hold the lock of `create_tables`."""
    if connection.execute(select(store.c.schema)).scalar_one() == 1:
        _metadata.create_all(connection, tables=[answers], checkfirst=False)
        connection.execute(update(store).values(schema=SCHEMA))


def check_schema(version: int, where: str) -> None:
    """Raise if this version of the package does not support the version of the tables' schema. It supports 1 and 2.

    Args:
        version: the version of the schema in the store.
        where: the store's name, for the error.

    Raises:
        FileFormatError: if it does not. The error gives both versions of the schema.
    """
    if not 1 <= version <= SCHEMA:
        raise FileFormatError(
            f"the profile store has schema {version}, but this version of personalized_soups supports schemas 1 to "
            f"{SCHEMA}",
            where=where,
            mend="install the version of personalized_soups that wrote the store, or a newer version",
        )
