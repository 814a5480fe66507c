"""Search a SQLite file for copies of deleted rows in its unused space."""

from __future__ import annotations

import operator
from functools import reduce

from sqlalchemy import ColumnElement, Connection, Text, bindparam, case, func, select

from personalized_soups.users.profiles.schema import answers, profiles
from personalized_soups.users.profiles.sqlite_descriptors import Identity, count_bytes

# SQLite stores a row of up to 1002 bytes in one piece (https://www.sqlite.org/fileformat2.html, section 1.6, with pages
# of 4096 bytes). The other columns of a row take less than 400 bytes. A longer document may be split between pages.
_UNSPLIT_BYTES = 600


def _occurrences(column: ColumnElement[str]) -> ColumnElement[int]:
    """Return how often the name occurs in all rows of a column, also as part of longer names and of other words."""
    name = bindparam("name", type_=Text)
    length: ColumnElement[int] = func.length(column)
    count = (length - func.length(func.replace(column, name, ""))) / func.length(name)
    return select(func.coalesce(func.sum(case((length > _UNSPLIT_BYTES, 0), else_=count)), 0)).scalar_subquery()


# The number of occurrences of a name in all rows, without those in long documents.
_OCCURRENCES = select(
    reduce(
        operator.add,
        (_occurrences(column) for table in (profiles, answers) for column in table.c if isinstance(column.type, Text)),
    )
)


def has_copies(connection: Connection, file: Identity, user: str) -> bool:
    """Return whether unused space of the file may contain a row of the user."""
    count = count_bytes(file, user.encode())
    return count > 0 and count > connection.execute(_OCCURRENCES, {"name": user}).scalar_one()
