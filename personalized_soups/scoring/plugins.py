"""Load scorers that installed packages provide as entry points of the group `personalized_soups.scorers`.

A package declares a scorer in its pyproject.toml; `docs/howto/add_a_scorer.md` shows a whole package:

    [project.entry-points."personalized_soups.scorers"]
    exclamations = "loudness:exclamations"

The names are read from the metadata of the packages. A package is imported only when one of its scorers is loaded.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

from personalized_soups.errors import DeclarationError, choose_from

GROUP = "personalized_soups.scorers"


def load_plugin(name: str, *, where: str) -> Any:
    """Import and return the scorer that an installed package provides under `name`.

    Args:
        name: the name of the entry point.
        where: the place in the catalogue that names the scorer, for error messages.

    Raises:
        DeclarationError: if no package provides the name, if several packages do, or if the scorer cannot be imported.
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
