"""The table of merge methods. A row names its function; nothing here imports torch, so the table prints at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

from personalized_soups.errors import UsageError, choose_from

Family = Literal["linear", "factor"]
Encoding = Literal["stacked", "truncated", "folded", "gated"]


@dataclass(frozen=True, slots=True)
class Method:
    """One row: what the soup's delta is, how it can be held, and where the idea is from.

    Args:
        name: as people write it in a profile.
        function: `module:name` of a pure function `(factors, weights) -> Factors`; in the family `linear` it takes
            `basis` too, and where `divides_by_sum` is set it takes `total`.
        family: `linear` in the deltas, or on the factors (`factor`: A's and B's summed apart).
        encodings: the ways in which its result can be held.
        formula: what dW is.
        source: paper or program.
        about: when to use it, in one sentence.
        needs_equal_ranks: whether all experts must have one rank at a module.
        needs_equal_scalings: whether all experts must have one scaling at a module.
        divides_by_sum: whether it divides by the sum of the weights, which then must not cancel.
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

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(import_module(module), name)
        return function


METHODS: Mapping[str, Method] = MappingProxyType({
    "linear": Method(
        name="linear",
        function="personalized_soups.methods.linear:linear",
        family="linear",
        encodings=("stacked", "truncated", "folded", "gated"),
        formula="sum w s B A",
        source="arXiv:2212.04089, arXiv:2306.04488",
        about="The weighted sum of what the experts add to the base: exact, and the default.",
    ),
    "factor_average": Method(
        name="factor_average",
        function="personalized_soups.methods.factors:factor_average",
        family="factor",
        encodings=("stacked", "truncated", "folded"),
        formula="(s/t) (sum w B) (sum w A), t = sum w",
        source="arXiv:2310.11564",
        about="The rule of Personalized Soups: A's and B's averaged apart, at one expert's rank, with cross terms.",
        needs_equal_ranks=True,
        needs_equal_scalings=True,
        divides_by_sum=True,
    ),
    "factor_linear": Method(
        name="factor_linear",
        function="personalized_soups.methods.factors:factor_linear",
        family="factor",
        encodings=("stacked", "truncated", "folded"),
        formula="(sum sqrt|ws| B) (sum sign(w) sqrt|ws| A)",
        source="PEFT add_weighted_adapter, combination_type='linear'",
        about="PEFT's `linear`: own terms right, cross terms added; inflated where experts share A.",
        needs_equal_ranks=True,
    ),
})  # fmt: skip


def method_named(name: str) -> Method:
    """Return the method of that name.

    Raises:
        UsageError: with the nearest name.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(
            f"there is no merge method {name!r}", where="method", mend=choose_from(name, METHODS)
        ) from None
