"""Skip the tests that need a package of an extra where that package is not installed.

The extras of pyproject.toml are optional (a GPU machine has no web server), so their packages may be missing. The core
dependencies may not: a test that lacks one of those fails.
"""

from __future__ import annotations

import re
import tomllib
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Imported by the server and its tests, and installed with fastapi, which says in which version.
_WITH_OTHERS = frozenset({"starlette"})


def packages_of_extras() -> frozenset[str]:
    """Return the packages of all extras by the names that Python imports them by."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    requirements = [line for extra in project["optional-dependencies"].values() for line in extra]
    names = {re.split(r"[^\w.-]", line)[0].lower().replace("-", "_") for line in requirements}
    return frozenset(names - {"personalized_soups"}) | _WITH_OTHERS  # an extra may name others of the project itself


def missing_packages() -> frozenset[str]:
    """Return the packages of extras that are not installed."""
    return frozenset(name for name in packages_of_extras() if find_spec(name) is None)


def missing_package(error: BaseException | None, missing: frozenset[str]) -> str | None:
    """Return the missing package that caused an error; None if something else did.

    Args:
        error: what was raised; errors that it was raised from count too.
        missing: packages that are not installed.
    """
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name in missing:
            return error.name
        error = error.__cause__
    return None
