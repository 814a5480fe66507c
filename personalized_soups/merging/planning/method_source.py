"""Describe in soup.json which code defines a merge method from outside this package."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from personalized_soups.adapters.provenance import MethodRecord
from personalized_soups.errors import UsageError
from personalized_soups.files.digest import digest_file
from personalized_soups.methods.method import Method
from personalized_soups.methods.plugins import is_builtin


def method_source(method: Method) -> MethodRecord | None:
    """Return the module, the name and the file digest of a method's function; None for a built-in method.

    The digest is that of the file that defines the function. Modules that this file imports are not included.

    Raises:
        UsageError: if the function cannot be imported, or the file that defines the function is not found.
    """
    if is_builtin(method):
        return None
    # functools.wraps gives a decorator the name of the function that it wraps, so that function is recorded
    function = inspect.unwrap(_loaded(method))
    path = _source_file(function)
    if path is None:
        raise UsageError(
            f"the file that defines the merge method {method.name!r} is not found, but soup.json must record the "
            "digest of that file",
            where="method",
            mend="define the function in a .py file and import it from there",
        )
    return MethodRecord(module=function.__module__, function=function.__qualname__, blake3=digest_file(path))


def _loaded(method: Method) -> Callable[..., Any]:
    try:
        return method.load()
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"the function of the merge method {method.name!r} cannot be imported from {method.function}: {error}",
            where="method",
            mend="correct `function` of the Method (`module:name`), or make that module importable",
        ) from error


def _source_file(function: Callable[..., Any]) -> Path | None:
    try:
        name = inspect.getsourcefile(function)
    except TypeError:  # for a compiled function, the file of the module is the extension
        name = getattr(sys.modules.get(function.__module__), "__file__", None)
    return Path(name) if name is not None and Path(name).is_file() else None
