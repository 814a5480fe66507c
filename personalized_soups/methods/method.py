"""The description of one merge method. Nothing here imports torch, so that methods can be listed quickly."""

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
    """One merge method: the formula of the soup's delta, the encodings of the result, and the source.

    Attributes:
        name: the name in a profile.
        function: a pure function `(parts, weights, **keywords)`, or `module:name` of one, which is imported when it is
            used. It takes one part and one weight per expert that adapts the module. Its keywords are the method's
            options (except the seed), `basis` in the family `linear`, and the keywords that the flags below add.
        family: `linear` (linear in the deltas) and `factor` (other rules on the factors) take `Factors` and return
            `Factors`; `dense` takes dense O x I deltas and returns one.
        encodings: the encodings in which the result can be held.
        formula: the formula of dW.
        source: the paper or program.
        about: when to use the method, in one sentence.
        needs_equal_ranks: whether all experts of a module must have the same rank.
        needs_equal_scalings: whether all experts of a module must have the same scaling.
        divides_by_sum: whether the method divides by the sum of the weights, which then must not cancel. Adds the
            keyword `total`.
        options: the names of the method's options in `OPTIONS`.
        trims_globally: whether each expert is trimmed over all of its modules at once. Adds the keyword `thresholds`.
        coefficients: for methods that only take weighted sums of the A's and of the B's: `module:name` of the function
            that computes the coefficients from scalings and weights (and `total` if `divides_by_sum` is set). The
            soups of many users are then one matrix product.

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
        """Whether the method draws random numbers. Its function then takes `streams`: one per expert, from the seed."""
        return "seed" in self.options

    def resolved(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return the value of every option of this method, given or default, by name in the order of `options`.

        Raises:
            UsageError: if the method has no such option, or a value is out of bounds. `where` is the option's name.
        """
        for name in given:
            if name not in self.options:
                raise self._not_taken(name)
        values = {name: self._checked(name, given.get(name, OPTIONS[name].default)) for name in self.options}
        if "epsilon" in values:
            self._check_width(values, given)
        return values

    def load(self) -> Callable[..., Any]:
        """Return the function, imported if its place is given."""
        return _imported(self.function) if isinstance(self.function, str) else self.function

    def load_coefficients(self) -> Callable[..., Any]:
        """Import and return the function that computes the coefficients of the A's and B's."""
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
