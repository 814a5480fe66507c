"""The table of built-in merge methods. This module does not import torch, so that the table can be printed quickly."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from personalized_soups.errors import UsageError, choose_from
from personalized_soups.methods.method import Encoding, Method

_METHODS = "personalized_soups.methods"
# for methods whose result is a pair of factors, which can be written without truncation
_EXACT: tuple[Encoding, ...] = ("stacked", "truncated", "folded")
# for methods whose result has full rank, so that it must be truncated or added to the base
_DENSE: tuple[Encoding, ...] = ("truncated", "folded")

_ROWS = (
    Method(
        name="linear",
        function=f"{_METHODS}.linear:linear",
        family="linear",
        # gated: a soup that is linear in the deltas can take other weights in each row of a batch
        encodings=("stacked", "truncated", "folded", "gated"),
        formula="sum w s B A",
        source="arXiv:2212.04089, arXiv:2306.04488",
        about="The weighted sum of the experts' deltas: exact, and the default.",
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
        about="Drops entries at random and rescales the rest: `linear` in expectation.",
        options=("density", "seed"),
    ),
    Method(
        name="dare_linear@mergekit",
        function=f"{_METHODS}.dense:dare_linear_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="sum w drop(d) |d|_1 / |drop(d)|_1",
        source="mergekit 0.1.5, merge_method: dare_linear",
        about="mergekit's DARE: rescales to the delta's L1 norm instead of by the density.",
        options=("density", "seed"),
    ),
    Method(
        name="ties",
        function=f"{_METHODS}.dense:ties",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree |w|, t = trim(d)",
        source="arXiv:2306.01708",
        about="Averages the entries of the elected sign by weight, so experts that disagree do not cancel.",
        options=("density", "lambda"),
    ),
    Method(
        name="ties@peft",
        function=f"{_METHODS}.dense:ties_peft",
        family="dense",
        encodings=_DENSE,
        formula="sum_agree w t / count_agree, election on t",
        source="PEFT, combination_type='ties_svd'",
        about="PEFT's TIES: elects without the weights and divides by the number of experts that agree.",
        options=("density",),
    ),
    Method(
        name="ties@mergekit",
        function=f"{_METHODS}.dense:ties_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree w",
        source="mergekit 0.1.5, merge_method: ties",
        about="mergekit's TIES: the divisor is signed, which flips the sign of negatively weighted experts.",
        options=("density", "lambda"),
    ),
    Method(
        name="ties@paper",
        function=f"{_METHODS}.dense:ties_paper",
        family="dense",
        encodings=_DENSE,
        formula="as ties, each expert trimmed over all of its modules at once",
        source="arXiv:2306.01708, its authors' code",
        about="The authors' TIES: one threshold for the whole model, so some modules keep more entries than others.",
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
        about="PEFT's dare_ties: elects without the weights and divides by the number of experts that agree.",
        options=("density", "seed"),
    ),
    Method(
        name="dare_ties@mergekit",
        function=f"{_METHODS}.dense:dare_ties_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t, t = drop(d) |d|_1 / |drop(d)|_1",
        source="mergekit 0.1.5, merge_method: dare_ties",
        about="mergekit's dare_ties: rescales to the L1 norm and sums the agreeing experts instead of averaging.",
        options=("density", "lambda", "seed"),
    ),
    Method(
        name="della",
        function=f"{_METHODS}.dense:della",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree |w|, t = drop_p(d) / p",
        source="arXiv:2406.11617",
        about="dare_ties that keeps the larger entries of a row more often.",
        options=("density", "epsilon", "lambda", "seed"),
    ),
    Method(
        name="della@mergekit",
        function=f"{_METHODS}.dense:della_mergekit",
        family="dense",
        encodings=_DENSE,
        formula="lambda sum_agree w t / sum_agree w, t = drop_p(d) |d|_1 / |drop_p(d)|_1",
        source="mergekit 0.1.5, merge_method: della",
        about="mergekit's DELLA: rescales to the L1 norm; the divisor is signed.",
        options=("density", "epsilon", "lambda", "seed"),
    ),
    Method(
        name="knots",
        function=f"{_METHODS}.knots:knots",
        family="factor",
        encodings=_EXACT,
        formula="U ties(S V), [d_1 ... d_E] = U S [V_1 ... V_E]",
        source="arXiv:2410.19735",
        about="TIES in the common basis of the experts' outputs: the rank is at most the sum of ranks; no dense delta.",
        options=("density", "lambda"),
    ),
    Method(
        name="factor_average",
        function=f"{_METHODS}.factors:factor_average",
        family="factor",
        encodings=_EXACT,
        formula="(s/t) (sum w B) (sum w A), t = sum w",
        source="arXiv:2310.11564",
        about="Personalized Soups' rule: averages A's and B's separately, at one expert's rank; adds cross terms.",
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
        about="PEFT's `linear`: adds cross terms, which inflate the result if experts share A.",
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
        about="PEFT's `magnitude_prune`: prunes and sums the A's and the B's separately.",
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
        about="PEFT's `dare_linear`: drops entries of the A's and the B's and sums them separately.",
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
        about="PEFT's `ties`: TIES on the A's and on the B's separately.",
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
        about="PEFT's `dare_ties`: DARE, then the election of TIES, on the A's and on the B's separately.",
        needs_equal_ranks=True,
        options=("density", "seed"),
    ),
)

METHODS: Mapping[str, Method] = MappingProxyType({row.name: row for row in _ROWS})


def method_named(name: str) -> Method:
    """Return the built-in method with this name.

    Raises:
        UsageError: if no built-in method has this name. `mend` proposes the most similar name.
    """
    try:
        return METHODS[name]
    except KeyError:
        raise UsageError(f"unknown merge method {name!r}", where="method", mend=choose_from(name, METHODS)) from None
