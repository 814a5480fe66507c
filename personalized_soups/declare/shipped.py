"""The recipe files that are shipped with the package."""

from __future__ import annotations

from pathlib import Path

from personalized_soups.errors import UsageError, choose_from

_PACKAGE = Path(__file__).resolve().parent.parent


def recipes_folder() -> Path:
    """Return the folder `recipes`, which is in the installed package or, in a checkout, next to the package."""
    inside = _PACKAGE / "recipes"
    return inside if inside.is_dir() else _PACKAGE.parent / "recipes"


def shipped_recipe(name: str) -> Path:
    """Return the path of a shipped recipe such as `train/tiny.yaml`.

    Raises:
        UsageError: if no recipe has this name. The error suggests the most similar name.

    Example:
        >>> shipped_recipe("train/tiny.yaml").name
        'tiny.yaml'
    """
    folder = recipes_folder()
    path = folder / name
    if not path.is_file():
        known = [str(recipe.relative_to(folder)) for recipe in folder.rglob("*.yaml")]
        raise UsageError(f"the package has no recipe {name!r}", where=str(folder), mend=choose_from(name, known))
    return path
