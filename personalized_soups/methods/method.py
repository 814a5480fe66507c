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
    """One row: what the soup's delta is, how it can be held, and where the idea is from.

    Args:
        name: as people write it in a profile.
        function: `module:name` of a pure function `(parts, weights, **keywords)`: one part and one weight per expert
            that has the module. Its keywords are those of its options (but the seed), `basis` in the family `linear`,
            and what the flags below add.
        family: `linear` in the deltas, or of other rules on the factors (`factor`): both take `Factors` and return
            `Factors`; or on the dense deltas (`dense`): these take O x I tensors and return one.
        encodings: the ways in which its result can be held.
        formula: what dW is.
        source: paper or program.
        about: when to use it, in one sentence.
        needs_equal_ranks: whether all experts must have one rank at a module.
        needs_equal_scalings: whether all experts must have one scaling at a module.
        divides_by_sum: whether it divides by the sum of the weights, which then must not cancel: it takes `total`.
        options: the names, out of `OPTIONS`, of what it can be given.
        trims_globally: whether each expert is trimmed over all of its modules at once: it takes `thresholds`.
        coefficients: where A's and B's are nothing but weighted sums, `module:name` of what gives their coefficients
            from scalings and weights (and `total`, where `divides_by_sum` is set): many users are then one product.
    """

    name: str
    function: str
    family: Family
    encodings: tuple[Encoding, ...]
    formula: str
    source: str
    about: str
    needs_equal_ranks: bool = False
    needs_equal_scalings: bool = False
    divides_by_sum: bool = False
    options: tuple[str, ...] = ()
    trims_globally: bool = False
    coefficients: str = ""

    @property
    def is_random(self) -> bool:
        """Whether it draws: its function takes `streams`, one per expert, and they hold the seed."""
        return "seed" in self.options

    def resolved(self, given: Mapping[str, float]) -> dict[str, float]:
        """Return every option of this method, in the row's order, by name: as given, else its default.

        Raises:
            UsageError: if the method does not take an option, or a value is out of bounds; `where` is the option's
                name.
        """
        for name in given:
            if name not in self.options:
                raise self._not_taken(name)
        values = {name: self._checked(name, given.get(name, OPTIONS[name].default)) for name in self.options}
        if "epsilon" in values:
            self._check_width(values, given)
        return values

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        return _imported(self.function)

    def load_coefficients(self) -> Callable[..., Any]:
        """Import and return the function that gives the coefficients of A's and B's."""
        return _imported(self.coefficients)

    def _not_taken(self, name: str) -> UsageError:
        mend = choose_from(name, self.options) if self.options else f"leave it out: {self.name} takes no options"
        return UsageError(f"{self.name} takes no option {name!r}", where=name, mend=mend)

    @staticmethod
    def _checked(name: str, value: float) -> float:
        option = OPTIONS[name]
        if not option.allows(value):
            raise UsageError(
                f"{name} is {value:g}, it must be {option.bounds}", where=name, mend=f"give {option.default:g}"
            )
        return int(value) if option.is_whole else float(value)

    @staticmethod
    def _check_width(values: Mapping[str, float], given: Mapping[str, float]) -> None:
        density, epsilon = values["density"], values["epsilon"]
        if density - epsilon <= 0 or density + epsilon > 1:
            raise UsageError(
                f"the keep-probabilities {density:g} -+ {epsilon:g} leave the range above 0 and at most 1",
                where="epsilon" if "epsilon" in given else "density",
                mend=f"give an epsilon below {density:g} and at most {1 - density:g}",
            )


def _imported(place: str) -> Callable[..., Any]:
    module, _, name = place.partition(":")
    function: Callable[..., Any] = getattr(import_module(module), name)
    return function
