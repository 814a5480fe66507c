"""The two tables of a store of profiles, and every question that is asked of them."""

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

SCHEMA = 1

_metadata = MetaData()

# Users are listed in the order of code points, as SQLite does by itself and PostgreSQL where it is told to.
_NAME = Text().with_variant(Text(collation="C"), "postgresql")

# A write adds a row, never changes one: two writers who saw the same version add the same key, and one of them fails.
profiles = Table(
    "psoups_profiles",
    _metadata,
    Column("user", _NAME, primary_key=True),
    Column("version", BigInteger, primary_key=True, autoincrement=False),
    Column("document", Text, nullable=False),  # JSON in ASCII: everything of the profile but its user
    Column("written_at", BigInteger, nullable=False),  # microseconds since 1970, UTC
    sqlite_with_rowid=False,
)

# One row: the schema's version, and the greatest version of any profile that was ever deleted (nobody's name is kept).
store = Table(
    "psoups_store",
    _metadata,
    Column("schema", BigInteger, nullable=False),
    Column("retired", BigInteger, nullable=False),
)

# What an import has read so far, on its own connection alone.
staged = Table(
    "psoups_staged",
    MetaData(),
    Column("user", _NAME, nullable=False),
    Column("document", Text, nullable=False),
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
# `pattern` is in lower case. lower() changes ASCII letters alone: SQLite's always, PostgreSQL's by the collation "C".
SEARCH = PAGE.where(func.lower(profiles.c.user).like(bindparam("pattern"), escape="\\"))
RETIRED = select(store.c.retired)
ADD = insert(profiles)
DELETE = delete(profiles).where(profiles.c.user == bindparam("name"))
RETIRE = update(store).where(store.c.retired < bindparam("last")).values(retired=bindparam("last"))

_last = select(func.max(_later.c.version)).where(_later.c.user == staged.c.user).correlate(staged).scalar_subquery()
# Every staged profile that differs from the current one becomes that user's next version.
ADD_STAGED = (
    insert(profiles)
    .from_select(
        ["user", "version", "document", "written_at"],
        select(
            staged.c.user,
            func.coalesce(profiles.c.version, select(store.c.retired).scalar_subquery()) + 1,
            staged.c.document,
            bindparam("now", type_=BigInteger),
        )
        .select_from(staged.outerjoin(profiles, (profiles.c.user == staged.c.user) & (profiles.c.version == _last)))
        .where(profiles.c.document.is_distinct_from(staged.c.document))
        .order_by(staged.c.user),
    )
    .execution_options(preserve_rowcount=True)
)


def create_tables(connection: Connection) -> None:
    """Make the tables; the caller has seen that they are not there and holds a lock."""
    _metadata.create_all(connection, checkfirst=False)
    connection.execute(insert(store).values(schema=SCHEMA, retired=0))


def check_schema(found: int, where: str) -> None:
    """Raise if the tables were made by a version of this package that this one does not know.

    Raises:
        FileFormatError: with both versions.
    """
    if found != SCHEMA:
        raise FileFormatError(
            f"the store of profiles has schema {found}, and this version of personalized_soups knows schema {SCHEMA}",
            where=where,
            mend="install the version of personalized_soups that wrote it, or a newer one",
        )
