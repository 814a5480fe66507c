"""The table of merge methods. A row names its function; nothing here imports torch, so the table prints at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import MappingProxyType
from typing import Any, Literal

from personalized_soups.errors import UsageError, choose_from

Family = Literal["linear", "factor", "dense"]
Encoding = Literal["stacked", "truncated", "folded", "gated"]

_EXACT: tuple[Encoding, ...] = ("stacked", "truncated", "folded")
_DENSE: tuple[Encoding, ...] = ("truncated", "folded")


@dataclass(frozen=True, slots=True)
class Option:
    """One number that a method can be given.

    Args:
        name: as people write it in a profile or on the command line.
        keyword: the functions' argument.
        default: where it is not given.
        least: the lower bound; itself left out where `is_open` is set.
        most: the upper bound, itself allowed.
        about: what it does.
        is_open: whether the value must be above `least`.
        is_whole: whether it must be a whole number.
    """

    name: str
    keyword: str
    default: float
    least: float
    most: float
    about: str
    is_open: bool = False
    is_whole: bool = False

    @property
    def bounds(self) -> str:
        """What may be given, in words."""
        kind = "a whole number " if self.is_whole else ""
        return f"{kind}{'above' if self.is_open else 'at least'} {self.least:g} and at most {self.most:.16g}"

    def allows(self, value: float) -> bool:
        """Return whether `value` is within the bounds; NaN is not."""
        above = self.least < value if self.is_open else self.least <= value
        return above and value <= self.most and not (self.is_whole and value != int(value))


OPTIONS: Mapping[str, Option] = MappingProxyType({
    option.name: option
    for option in (
        Option("density", "density", 0.5, 0.0, 1.0, "The share of entries that is kept.", is_open=True),
        Option("epsilon", "epsilon", 0.1, 0.0, 1.0, "Half the width of della's keep-probabilities, about density."),
        Option("lambda", "lambda_", 1.0, 0.0, 1e30, "Scales what an election gives.", is_open=True),
        # a whole number beyond 2^53 would not survive as a float
        Option("seed", "seed", 0, 0, 2**53, "Of the random draws; the same seed, the same soup.", is_whole=True),
    )
})  # fmt: skip


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


_METHODS = "personalized_soups.methods"

_ROWS = (
    Method(
        name="linear",
        function=f"{_METHODS}.linear:linear",
        family="linear",
        encodings=("stacked", "truncated", "folded", "gated"),
        formula="sum w s B A",
        source="arXiv:2212.04089, arXiv:2306.04488",
        about="The weighted sum of what the experts add to the base: exact, and the default.",
    ),
    Method(
        name="magnitude_prune",
        function=f"{_METHODS}.dense:magnitude_prune",
        family="dense",
        encodings=_DENSE,
        formula="sum w trim(d)",
        source="PEFT, combination_type='magnitude_prune_svd'",
        about="The weighted sum of each delta's largest entries.",
        options=("density",),
    ),
    Method(
        name="dare_linear",
        function=f"{_METHODS}.dense:dare_linear",
        family="dense",
        encodings=_DENSE,
        formula="sum w drop(d) / density",
        source="arXiv:2311.03099",
        about="Entries dropped at random, the rest rescaled: `linear` in expectation.",
        options=("density", "seed"),
    ),
    Method(
        name="dare_linear@mergekit",
        function=f"{_METHODS}.dense:dare_linear_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="sum w drop(d) |d|_1 / |drop(d)|_1",
        source="mergekit 0.1.5, merge_method: dare_linear",
        about="mergekit's DARE: rescaled to the delta's L1 norm instead of by the density.",
        options=("density", "seed"),
    ),
    Method(
        name="ties",
        function=f"{_METHODS}.dense:ties",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree |w|, t = trim(d)",
        source="arXiv:2306.01708",
        about="Entries of the elected sign averaged by weight: experts that disagree do not cancel.",
        options=("density", "lambda"),
    ),
    Method(
        name="ties@peft",
        function=f"{_METHODS}.dense:ties_peft",
        family="dense",
        encodings=_DENSE,
        formula="sum_agree w t / count_agree, election on t",
        source="PEFT, combination_type='ties_svd'",
        about="PEFT's TIES: elects without the weights and divides by how many agree.",
        options=("density",),
    ),
    Method(
        name="ties@mergekit",
        function=f"{_METHODS}.dense:ties_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree w",
        source="mergekit 0.1.5, merge_method: ties",
        about="mergekit's TIES: a signed divisor, which turns the sign of negatively weighted experts.",
        options=("density", "lambda"),
    ),
    Method(
        name="ties@paper",
        function=f"{_METHODS}.dense:ties_paper",
        family="dense",
        encodings=_DENSE,
        formula="as ties, each expert trimmed over all of its modules at once",
        source="arXiv:2306.01708, its authors' code",
        about="The authors' TIES: large modules may keep more than small ones.",
        options=("density", "lambda"),
        trims_globally=True,
    ),
    Method(
        name="dare_ties",
        function=f"{_METHODS}.dense:dare_ties",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree |w|, t = drop(d) / density",
        source="arXiv:2311.03099, arXiv:2306.01708",
        about="DARE's drop and rescale, then the election of TIES.",
        options=("density", "lambda", "seed"),
    ),
    Method(
        name="dare_ties@peft",
        function=f"{_METHODS}.dense:dare_ties_peft",
        family="dense",
        encodings=_DENSE,
        formula="sum_agree w t / count_agree, election on t = drop(d) / density",
        source="PEFT, combination_type='dare_ties_svd'",
        about="PEFT's: elects without the weights and divides by how many agree.",
        options=("density", "seed"),
    ),
    Method(
        name="dare_ties@mergekit",
        function=f"{_METHODS}.dense:dare_ties_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t, t = drop(d) |d|_1 / |drop(d)|_1",
        source="mergekit 0.1.5, merge_method: dare_ties",
        about="mergekit's: rescaled to the L1 norm, and a sum of those that agree, not a mean.",
        options=("density", "lambda", "seed"),
    ),
    Method(
        name="della",
        function=f"{_METHODS}.dense:della",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree |w|, t = drop_p(d) / p",
        source="arXiv:2406.11617",
        about="As dare_ties, but larger entries of a row are kept more often.",
        options=("density", "epsilon", "lambda", "seed"),
    ),
    Method(
        name="della@mergekit",
        function=f"{_METHODS}.dense:della_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree w, t = drop_p(d) |d|_1 / |drop_p(d)|_1",
        source="mergekit 0.1.5, merge_method: della",
        about="mergekit's DELLA: rescaled to the L1 norm, and a signed divisor.",
        options=("density", "epsilon", "lambda", "seed"),
    ),
    Method(
        name="knots",
        function=f"{_METHODS}.knots:knots",
        family="factor",
        encodings=_EXACT,
        formula="U ties(S V), [d_1 ... d_E] = U S [V_1 ... V_E]",
        source="arXiv:2410.19735",
        about="TIES in the common basis of the experts' outputs: at most their ranks' sum, no dense delta.",
        options=("density", "lambda"),
    ),
    Method(
        name="factor_average",
        function=f"{_METHODS}.factors:factor_average",
        family="factor",
        encodings=_EXACT,
        formula="(s/t) (sum w B) (sum w A), t = sum w",
        source="arXiv:2310.11564",
        about="The rule of Personalized Soups: A's and B's averaged apart, at one expert's rank, with cross terms.",
        needs_equal_ranks=True,
        needs_equal_scalings=True,
        divides_by_sum=True,
        coefficients=f"{_METHODS}.factors:average_coefficients",
    ),
    Method(
        name="factor_linear",
        function=f"{_METHODS}.factors:factor_linear",
        family="factor",
        encodings=_EXACT,
        formula="(sum sqrt|ws| B) (sum sign(w) sqrt|ws| A)",
        source="PEFT add_weighted_adapter, combination_type='linear'",
        about="PEFT's `linear`: own terms right, cross terms added; inflated where experts share A.",
        needs_equal_ranks=True,
        coefficients=f"{_METHODS}.factors:linear_coefficients",
    ),
    Method(
        name="factor_magnitude_prune",
        function=f"{_METHODS}.factors:factor_magnitude_prune",
        family="factor",
        encodings=_EXACT,
        formula="as factor_linear, of trim(B) and trim(A)",
        source="PEFT add_weighted_adapter, combination_type='magnitude_prune'",
        about="PEFT's rule: the A's and the B's pruned and summed apart.",
        needs_equal_ranks=True,
        options=("density",),
    ),
    Method(
        name="factor_dare_linear",
        function=f"{_METHODS}.factors:factor_dare_linear",
        family="factor",
        encodings=_EXACT,
        formula="as factor_linear, of drop(B) / density and drop(A) / density",
        source="PEFT add_weighted_adapter, combination_type='dare_linear'",
        about="PEFT's rule: entries of the A's and the B's dropped and summed apart.",
        needs_equal_ranks=True,
        options=("density", "seed"),
    ),
    Method(
        name="factor_ties",
        function=f"{_METHODS}.factors:factor_ties",
        family="factor",
        encodings=_EXACT,
        formula="ties@peft of the B's, weights sqrt|ws|, and of the A's, weights sign(w) sqrt|ws|",
        source="PEFT add_weighted_adapter, combination_type='ties'",
        about="PEFT's rule: TIES on the A's and on the B's apart.",
        needs_equal_ranks=True,
        options=("density",),
    ),
    Method(
        name="factor_dare_ties",
        function=f"{_METHODS}.factors:factor_dare_ties",
        family="factor",
        encodings=_EXACT,
        formula="dare_ties@peft of the B's, weights sqrt|ws|, and of the A's, weights sign(w) sqrt|ws|",
        source="PEFT add_weighted_adapter, combination_type='dare_ties'",
        about="PEFT's rule: DARE, then TIES' election, on the A's and on the B's apart.",
        needs_equal_ranks=True,
        options=("density", "seed"),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


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
