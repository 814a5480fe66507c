"""Merge methods from outside this package: a Python function, a `Method`, or a method of an installed package.

A package declares a method in its pyproject.toml. docs/howto/add_a_method.md shows a complete package:

    [project.entry-points."personalized_soups.methods"]
    clipped = "clipping:clipped"

The names of the methods come from the metadata of the installed packages. A package is imported only when one of its
methods is used. This module does not import torch, so that profiles can be loaded quickly.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any, Protocol

from personalized_soups.errors import UsageError, choose_from
from personalized_soups.methods.method import Encoding, Family, Method
from personalized_soups.methods.options import OPTIONS
from personalized_soups.methods.table import METHODS

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "personalized_soups.methods"

# The encodings in which the result of a method can be stored, by the method's family. "gated" needs a result that is
# linear in the deltas. The family "linear" is missing, because it has only one formula, which the package computes in
# several ways without calling the function.
_ENCODINGS: dict[Family, tuple[Encoding, ...]] = {
    "dense": ("truncated", "folded"),
    "factor": ("stacked", "truncated", "folded"),
}


class DenseMerge(Protocol):
    """A merge method as a function that takes the experts' deltas of one weight tensor and returns the merged delta.

    `merge`, `merge_into_base` and `merge_many` call the function once for each weight tensor that an expert adapts. For
    a parameter of a mixture-of-experts layer, they call it once for each block of the parameter. On a CPU, several
    threads call the function at the same time.

    Args:
        deltas: the dense deltas `scaling * B @ A` of the experts that adapt this tensor, in the order of the experts'
            names. There is at least one delta. Each delta is a float32 matrix [O, I] (O = out_features, I =
            in_features) on the device of the merge. The function may overwrite the deltas.
        weights: the experts' weights in the same order. A weight may be negative, but is never 0.

    Returns:
        The merged delta: a finite tensor with the shape, dtype and device of the deltas.

    Example:
        >>> import torch
        >>> def mean(deltas, weights):
        ...     return sum(weight * delta for weight, delta in zip(weights, deltas)) / len(deltas)
        >>> mean([torch.tensor([[4.0, 2.0]]), torch.tensor([[1.0, 0.0]])], [0.5, 1.0])
        tensor([[1.5000, 0.5000]])
        >>> options = MergeOptions(method=mean, rank=8)
    """

    def __call__(self, deltas: list[Tensor], weights: list[float], /) -> Tensor:
        """Return the merged delta."""
        ...


def find_method(method: str | Method | DenseMerge) -> Method:
    """Return the `Method` that has the name `method`, or that calls the function `method`.

    A `Method` is checked and returned unchanged. A name is looked up first in the table of built-in methods, and then
    in the metadata of the installed packages. If an installed package provides the method, the package is imported.

    Raises:
        UsageError: if no method has the name, if several packages provide it, if the package cannot be imported, or if
            the function or the `Method` cannot be used.
    """
    if isinstance(method, Method):
        return _checked(method)
    if not isinstance(method, str):
        return method_of_function(method)
    return METHODS[method] if method in METHODS else _load(_entry_point(method))


def is_builtin(method: Method) -> bool:
    """Return whether a method is in this package's table of built-in methods."""
    return METHODS.get(method.name) == method


def method_of_function(function: object, name: str | None = None) -> Method:
    """Return a `Method` of the family `dense` for a function. If `name` is None, its name is `module:function`.

    Raises:
        UsageError: if `function` is not a function. A functools.partial or a callable object is rejected too, because
            it has settings that soup.json does not record.
    """
    module, qualified = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not callable(function) or isinstance(function, type) or module is None or qualified is None:
        raise UsageError(
            f"the merge method is {function!r}; expected a name, a Method or a function",
            where="method",
            mend="define a function `merge(deltas, weights)` in a module, and pass the function: method=merge",
        )
    return Method(
        name=name or f"{module}:{qualified}",
        function=function,
        family="dense",
        encodings=_ENCODINGS["dense"],
        formula=f"{qualified}(deltas, weights)",
        source=module,
        about=(function.__doc__ or "").strip().partition("\n")[0],
    )


def installed_methods() -> dict[str, EntryPoint]:
    """Return the entry points of the methods of installed packages, by the method's name. No package is imported.

    A built-in method takes precedence over an installed method of the same name, which is left out. If several packages
    provide a name, the dictionary contains the entry point of one of them.
    """
    installed = sorted(entry_points(group=GROUP), key=lambda entry_point: entry_point.name)
    return {entry_point.name: entry_point for entry_point in installed if entry_point.name not in METHODS}


def is_method_name(name: str) -> bool:
    """Return whether a built-in method or a method of an installed package has the name. No package is imported."""
    return name in METHODS or bool(_providers(name))


def method_names() -> list[str]:
    """Return the names of the built-in methods, followed by the names of the methods of installed packages."""
    return [*METHODS, *installed_methods()]


def package_of(entry_point: EntryPoint) -> str:
    """Return the name and version of the package that declares an entry point."""
    distribution = entry_point.dist
    return "an unnamed package" if distribution is None else f"{distribution.name} {distribution.version}"


def _entry_point(name: str) -> EntryPoint:
    providers = _providers(name)
    if not providers:
        raise UsageError(f"unknown merge method {name!r}", where="method", mend=choose_from(name, method_names()))
    if len(providers) > 1:
        raise UsageError(
            f"several packages provide the merge method {name!r}: {', '.join(sorted(map(package_of, providers)))}",
            where="method",
            mend="uninstall all of these packages but one, or pass the function itself: MergeOptions(method=FUNCTION)",
        )
    return providers[0]


def _providers(name: str) -> tuple[EntryPoint, ...]:
    try:
        return _cached_providers(name, tuple(sys.path))
    except LookupError:
        return ()


# A file of profiles may name one method in a hundred thousand lines, and reading the metadata of all packages takes
# milliseconds, so the result is cached. For a name that no package provides, this function raises an error, which is
# not cached, so that a package that is installed later is found.
@lru_cache(maxsize=64)
def _cached_providers(name: str, _path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    providers = tuple(entry_point for entry_point in entry_points(group=GROUP) if entry_point.name == name)
    if not providers:
        raise LookupError(name)
    return providers


def _load(entry_point: EntryPoint) -> Method:
    package = package_of(entry_point)
    try:
        target: Any = entry_point.load()
    except Exception as error:
        raise UsageError(
            f"the merge method {entry_point.name!r} of the package {package} cannot be imported from "
            f"{entry_point.value}: {type(error).__name__}: {error}",
            where="method",
            mend=f"run `pip install -U {package.partition(' ')[0]}`, or choose another method",
        ) from error
    try:
        if isinstance(target, Method):
            return _checked(replace(target, name=entry_point.name))
        return method_of_function(target, entry_point.name)
    except UsageError as error:
        raise UsageError(
            f"the merge method {entry_point.name!r} of the package {package} cannot be used: {error.what}",
            where="method",
            mend=f"run `pip install -U {package.partition(' ')[0]}`, or choose another method",
        ) from error


def _checked(method: Method) -> Method:
    if is_builtin(method):
        return method
    faults = _faults(method)
    if faults:
        raise UsageError(
            f"the Method {method.name!r} cannot be used: {'; '.join(faults)}",
            where="method",
            mend="correct the fields of the Method as in docs/howto/add_a_method.md",
        )
    return method


def _faults(method: Method) -> list[str]:
    faults = []
    if not method.name or method.name in METHODS:
        faults.append(f"its name is {method.name!r}; expected a name that no built-in method has")
    if method.family not in _ENCODINGS:
        faults.append(f"its family is {method.family!r}; expected 'dense' or 'factor'")
    allowed = _ENCODINGS.get(method.family, ())
    if not method.encodings or not set(method.encodings) <= set(allowed):
        faults.append(f"its encodings are {method.encodings}; expected some of {allowed}")
    if unknown := [option for option in method.options if option not in OPTIONS]:
        faults.append(f"its options include {', '.join(unknown)}; expected some of {', '.join(OPTIONS)}")
    if "density" not in method.options and (method.trims_globally or "epsilon" in method.options):
        faults.append("it has no option 'density', but trims_globally and the option 'epsilon' need 'density'")
    if method.coefficients:
        faults.append("it has coefficients, but only built-in methods can have coefficients")
    if method.family == "dense" and method.divides_by_sum:
        faults.append("it sets divides_by_sum, but only methods of the family 'factor' can set divides_by_sum")
    return faults
