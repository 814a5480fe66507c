"""Scorers that installed packages provide, by name: entry points of the group `personalized_soups.scorers`.

A package declares a scorer in its pyproject.toml; `docs/howto/add_a_scorer.md` shows a whole package:

    [project.entry-points."personalized_soups.scorers"]
    exclamations = "loudness:exclamations"

Names come from the packages' metadata. A package is imported only when a scorer of it is loaded.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from personalized_soups.errors import DeclarationError, choose_from

GROUP = "personalized_soups.scorers"


def load_plugin(name: str, *, where: str) -> Any:
    """Import and return the function that an installed package provides under `name`.

    Args:
        name: the entry point's name.
        where: the line of the catalogue that names it, for errors.

    Raises:
        DeclarationError: if no package or more than one provides the name, or its function cannot be imported.
    """
    installed = entry_points(group=GROUP)
    matches = [entry_point for entry_point in installed if entry_point.name == name]
    if not matches:
        names = sorted({entry_point.name for entry_point in installed})
        raise DeclarationError(
            f"no package provides the scorer {name!r}; the installed scorers are: {', '.join(names) or 'none'}",
            where=where,
            mend=choose_from(name, names)
            if names
            else f"install a package that has an entry point in the group {GROUP!r}",
        )
    if len(matches) > 1:
        raise DeclarationError(
            f"more than one package provides the scorer {name!r}: {', '.join(sorted(map(_package, matches)))}",
            where=where,
            mend=f"write `kind: python` and `function: {matches[0].value}`, or uninstall all packages but one",
        )
    try:
        return matches[0].load()
    except (ImportError, AttributeError) as error:
        raise DeclarationError(
            f"the scorer {name!r} of {_package(matches[0])} cannot be imported: {error}",
            where=where,
            mend=f"fix or reinstall {_package(matches[0])}: its entry point is {matches[0].value!r}",
        ) from error


def _package(entry_point: EntryPoint) -> str:
    return "an unnamed package" if entry_point.dist is None else entry_point.dist.name
