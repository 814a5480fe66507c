"""The description of a merge method. This module does not import torch, so that methods can be listed quickly."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from personalized_soups.errors import UsageError, choose_from
from personalized_soups.methods.options import OPTIONS

Family = Literal["linear", "factor", "dense"]
Encoding = Literal["stacked", "truncated", "folded", "gated"]


@dataclass(frozen=True, slots=True)
class Method:
    """A merge method: its function, the encodings of its result, its formula and its source.

    Attributes:
        name: the method's name in a profile.
        function: a pure function `(parts, weights, **keywords)`, or the place `module:name` of such a function, which
            is imported when it is used. The function takes one part and one weight per expert that adapts the module.
            Its keywords are the method's options (except the seed), `basis` if the family is `linear`, and the keywords
            that other attributes add.
        family: the type of the parts and of the result. `linear` (the result is linear in the deltas) and `factor`
            (other formulas on the factors) take `Factors` and return `Factors`. `dense` takes dense O x I deltas (O =
            out_features, I = in_features) and returns one dense delta.
        encodings: the encodings in which the result can be stored.
        formula: the formula of the soup's delta.
        source: the paper or program that defines the method.
        about: one sentence that says when to use the method.
        needs_equal_ranks: whether all experts must have the same rank in a module.
        needs_equal_scalings: whether all experts must have the same scaling in a module.
        divides_by_sum: whether the method divides by the sum of the weights. The sum must then not be about 0, and the
            function takes the keyword `total`.
        options: the names of the method's options. `OPTIONS` describes each option.
        trims_globally: whether each expert is trimmed over all of its modules at once. The function then takes the
            keyword `thresholds`.
        coefficients: the place `module:name` of a function that computes the coefficients of the A's and B's from the
            scalings and weights (and from `total` if `divides_by_sum` is set). Only methods that return weighted sums
            of the A's and of the B's have such a function. The soups of many users are then computed by one matrix
            product.

    Example:
        >>> def mean(deltas, weights, *, lambda_):
        ...     return lambda_ * sum(deltas) / len(deltas)
        >>> method = Method("mean", mean, family="dense", encodings=("truncated", "folded"), options=("lambda",))
        >>> method.resolved({})
        {'lambda': 1.0}
        >>> options = MergeOptions(method=method, method_options={"lambda": 0.5}, rank=8)
    """

    name: str
    function: str | Callable[..., Any]
    family: Family
    encodings: tuple[Encoding, ...]
    formula: str = ""
    source: str = ""
    about: str = ""
    needs_equal_ranks: bool = False
    needs_equal_scalings: bool = False
    divides_by_sum: bool = False
    options: tuple[str, ...] = ()
    trims_globally: bool = False
    coefficients: str = ""

    @property
    def is_random(self) -> bool:
        """Whether the method draws random numbers. Its function then takes `streams`, one random stream per expert."""
        return "seed" in self.options

    def resolved(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return the value of each option of this method, by the option's name, in the order of `options`.

        Args:
            given: values by the name of the option. Options that are not given have their default values.

        Raises:
            UsageError: if the method does not have a given option, or if a value is out of bounds. `where` is the
                option's name.
        """
        for name in given:
            if name not in self.options:
                raise self._not_taken(name)
        values = {name: self._checked(name, given.get(name, OPTIONS[name].default)) for name in self.options}
        if "epsilon" in values:
            self._check_width(values, given)
        return values

    def load(self) -> Callable[..., Any]:
        """Return the method's function. If `function` is a place `module:name`, import the module."""
        return _imported(self.function) if isinstance(self.function, str) else self.function

    def load_coefficients(self) -> Callable[..., Any]:
        """Import the function that computes the coefficients of the A's and B's, and return the function."""
        return _imported(self.coefficients)

    def _not_taken(self, name: str) -> UsageError:
        mend = choose_from(name, self.options) if self.options else f"remove {name!r}: {self.name} takes no options"
        return UsageError(f"the method {self.name} takes no option {name!r}", where=name, mend=mend)

    @staticmethod
    def _checked(name: str, value: float) -> float:
        option = OPTIONS[name]
        if not option.allows(value):
            raise UsageError(
                f"{name} is {value:g}; it must be {option.bounds}",
                where=name,
                mend=f"use {option.default:g}, the default",
            )
        return int(value) if option.is_whole else float(value)

    @staticmethod
    def _check_width(values: Mapping[str, float], given: Mapping[str, float]) -> None:
        density, epsilon = values["density"], values["epsilon"]
        if density - epsilon <= 0 or density + epsilon > 1:
            raise UsageError(
                f"density {density:g} with epsilon {epsilon:g} gives keep-probabilities from {density - epsilon:g} to "
                f"{density + epsilon:g}; they must all be above 0 and at most 1",
                where="epsilon" if "epsilon" in given else "density",
                mend=f"use an epsilon below {density:g} and at most {1 - density:g}",
            )


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
