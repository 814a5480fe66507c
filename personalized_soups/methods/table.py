"""The table of the package's merge methods. Nothing here imports torch, so that the table can be printed quickly."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from personalized_soups.errors import UsageError, choose_from
from personalized_soups.methods.method import Encoding, Method

_METHODS = "personalized_soups.methods"
_EXACT: tuple[Encoding, ...] = ("stacked", "truncated", "folded")
_DENSE: tuple[Encoding, ...] = ("truncated", "folded")

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
