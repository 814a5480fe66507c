"""Open a profile store for a command, and show the profiles in it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.errors import check_extra

if TYPE_CHECKING:
    from personalized_soups.cli import render
    from personalized_soups.declare.profile import Profile
    from personalized_soups.users.profiles.store import ProfileStore, StoredProfile

CheckedExpertsOption = Annotated[
    list[Path] | None,
    typer.Option(help="Check profiles against this folder of experts. May be repeated.", show_default=False),
]

DEFAULT_STORE = "profiles.db"


@contextmanager
def opened_store(where: str, experts: list[Path] | None = None, *, create: bool = False) -> Iterator[ProfileStore]:
    """Open the profile store, yield it and close it.

    Args:
        where: the file or address of the store.
        experts: folders of experts; the store rejects profiles that do not fit them.
        create: create the store if it does not exist.

    Raises:
        SoupError: if the store cannot be opened, or a package is missing.
    """
    check_extra("serve", "sqlalchemy")
    from personalized_soups.users.profiles.store import ProfileStore

    check = None
    if experts:
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.users.profiles.checks import library_check

        check = library_check(ExpertLibrary.open(*experts))
    with ProfileStore.open(where, check=check, create=create) as store:
        yield store


def fields_of(profile: Profile) -> dict[str, Any]:
    """Return the user and the profile's other fields that differ from their defaults. The user is the first key."""
    return {"user": profile.user, **profile.model_dump(mode="json", exclude_defaults=True)}


def json_of(stored: StoredProfile) -> dict[str, Any]:
    """Return a stored version of a profile as a JSON object."""
    return {
        "user": stored.profile.user,
        "version": stored.version,
        "written_at": stored.written_at.isoformat(),
        "profile": fields_of(stored.profile),
    }


def cells_of(stored: StoredProfile) -> list[render.Cell]:
    """Return three table cells of a stored profile: its version, its time, and its weights with other fields."""
    weights = ", ".join(f"{printable(name)}={weight:g}" for name, weight in stored.profile.weights.items())
    fields: Mapping[str, object] = stored.profile.model_dump(
        exclude_defaults=True, exclude={"user", "weights", "options"}
    )
    texts = [weights, *(f"{name}: {value}" for name, value in fields.items())]
    return [stored.version, time_of(stored), "; ".join(texts)]


def time_of(stored: StoredProfile) -> str:
    """Return the time at which a version was written, to the second."""
    return stored.written_at.isoformat(sep=" ", timespec="seconds")


def printable(name: str) -> str:
    """Return `name` if it is safe to print, else its `repr`, because a terminal would execute control characters."""
    return name if name.isprintable() and name.strip() == name else repr(name)


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, such as `1 answer` or `2 answers`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
