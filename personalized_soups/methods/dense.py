"""Merge methods on dense deltas. They sparsify each expert's delta, then sum the deltas or elect a sign for each entry.

Each function takes one delta_OI and one weight for every expert that adapts the module. All deltas have one shape,
dtype and device. A weight may be negative. The result is a new tensor of the same shape, dtype and device. No argument
is changed. The functions compute in blocks of rows, so they allocate little memory besides the result. 16-bit deltas
are computed in float32, and the result is rounded once. An expert that does not adapt the module is left out of both
lists. Its delta would be 0, and an entry of 0 agrees with neither sign.

Trimming keeps the `k = int(density * count)` entries of the largest magnitude, and every other entry whose magnitude
equals the k-th largest. If k is 0, trimming keeps no entry. (PEFT and mergekit keep exactly k entries, and do not
define which of several equal entries they keep. mergekit keeps at least one entry.) The random methods decide whether
to keep entry i of an expert's delta from word i of the expert's random stream.

Every method with density 1, epsilon 0 and lambda 1 returns the delta of a single expert of weight 1 unchanged. All
functions raise ValueError if there are no deltas, if the deltas are not matrices of one shape and dtype, or if the
lists have different lengths.

In the formulas, d is an expert's delta, w is its weight, and t is its sparsified delta. `trim(d)` is d after trimming.
`drop(d)` keeps each entry of d with probability `density` and sets the others to 0. `|d|_1` is the sum of the
magnitudes of d. `sum_agree` and `count_agree` are the sum over, and the number of, the experts whose entry has the
elected sign.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from personalized_soups.methods.blocks import row_blocks, widened
from personalized_soups.methods.elect import (
    Fuse,
    agreed_mean,
    agreed_mean_mergekit,
    agreed_mean_peft,
    agreed_sum,
    weighted_sum,
)
from personalized_soups.methods.sparsify import Keep, drop, drop_small, matched, scaled, threshold, trim
from personalized_soups.methods.streams import Stream

Deltas = Sequence[Tensor]
Weights = Sequence[float]


def magnitude_prune(deltas: Deltas, weights: Weights, *, density: float) -> Tensor:
    """Return `sum w trim(d)`. PEFT calls this method magnitude_prune (peft.utils.merge_utils)."""
    return _merged(deltas, weights, _trims(deltas, density), weighted_sum)


def dare_linear(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum w drop(d) / density` (arXiv 2311.03099). PEFT calls this method dare_linear.

    The mean of the result over all random draws is `linear`.
    """
    return _merged(deltas, weights, _drops(density, streams), weighted_sum)


def dare_linear_mergekit(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum w t` with `t = drop(d) |d|_1 / |drop(d)|_1`, as mergekit's dare_linear does by default."""
    return _merged(deltas, weights, _matched_drops(deltas, density, streams), weighted_sum)


def ties(deltas: Deltas, weights: Weights, *, density: float, lambda_: float) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = trim(d)` (arXiv 2306.01708).

    The elected sign of an entry is the sign of `sum w t`. The paper has no weights. With equal weights, this function
    follows the paper, except that the paper trims over the whole model (see `ties_paper`). A common factor of all
    weights has no effect; change `lambda_` instead.
    """
    return _merged(deltas, weights, _trims(deltas, density), lambda ws: agreed_mean(ws, lambda_))


def ties_peft(deltas: Deltas, weights: Weights, *, density: float) -> Tensor:
    """Return `sum_agree w t / count_agree` with `t = trim(d)`, as PEFT's `ties_svd` does before its SVD.

    The elected sign of an entry is the sign of `sum t`.
    """
    return _merged(deltas, weights, _trims(deltas, density), agreed_mean_peft)


def ties_mergekit(deltas: Deltas, weights: Weights, *, density: float, lambda_: float) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree w` with `t = trim(d)`, as mergekit's ties does with `normalize: true`.

    The elected sign of an entry is the sign of `sum w t`. The divisor can be negative. Trimming keeps at least one
    entry, as in mergekit.
    """
    return _merged(deltas, weights, _trims(deltas, density, at_least=1), lambda ws: agreed_mean_mergekit(ws, lambda_))


def ties_paper(
    deltas: Deltas, weights: Weights, *, density: float, lambda_: float, thresholds: Sequence[float] | None = None
) -> Tensor:
    """Return the result of `ties`, but trim each expert over all of its modules at once, as the authors' code does.

    The authors' code has no weights. Here, the weights have the same effect as in `ties`. (The authors' code keeps k +
    1 entries. Where the sum of an entry is 0, it elects the majority sign of the whole model.)

    Args:
        deltas: the experts' deltas of this module.
        weights: the experts' weights.
        density: the share of the entries of each delta to keep. It is used only if `thresholds` is None.
        lambda_: the factor of the result.
        thresholds: for each expert, the smallest magnitude to keep. `sparsify.global_threshold` computes it from the
            deltas of all modules of the expert.
    """
    keeps = _trims(deltas, density) if thresholds is None else [trim(least) for least in thresholds]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean(ws, lambda_))


def dare_ties(deltas: Deltas, weights: Weights, *, density: float, lambda_: float, streams: Sequence[Stream]) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = drop(d) / density` (arXiv 2311.03099 and 2306.01708)."""
    return _merged(deltas, weights, _drops(density, streams), lambda ws: agreed_mean(ws, lambda_))


def dare_ties_peft(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum_agree w t / count_agree` with `t = drop(d) / density`, as PEFT's `dare_ties_svd` does before its SVD.

    The elected sign of an entry is the sign of `sum t`.
    """
    return _merged(deltas, weights, _drops(density, streams), agreed_mean_peft)


def dare_ties_mergekit(
    deltas: Deltas, weights: Weights, *, density: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t` with `t = drop(d) |d|_1 / |drop(d)|_1`, as mergekit's dare_ties does.

    mergekit sets `normalize: false` for this method by default, so the formula has no divisor.
    """
    return _merged(deltas, weights, _matched_drops(deltas, density, streams), lambda ws: agreed_sum(ws, lambda_))


def della(
    deltas: Deltas, weights: Weights, *, density: float, epsilon: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = drop_p(d) / p` (arXiv 2406.11617).

    `drop_p(d)` keeps each entry with its own probability p. In each row, p rises with the rank of the entry's
    magnitude, from `density - epsilon` to `density + epsilon`, as in mergekit. (In the paper, epsilon is the whole
    width of the range, and p is the probability to drop an entry.)
    """
    keeps = [drop_small(density, epsilon, stream, rescales=True) for stream in streams]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean(ws, lambda_))


def della_mergekit(
    deltas: Deltas, weights: Weights, *, density: float, epsilon: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree w`, where `t = drop_p(d) |d|_1 / |drop_p(d)|_1`: mergekit's della."""
    keeps = [
        matched(drop_small(density, epsilon, stream, rescales=False), delta_OI)
        for delta_OI, stream in zip(deltas, streams, strict=True)
    ]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean_mergekit(ws, lambda_))


def _merged(deltas: Deltas, weights: Weights, keeps: Iterable[Keep], fuse_of: Callable[[Weights], Fuse]) -> Tensor:
    """Sparsify each delta with the rule at its position in `keeps`, and fuse the results with `fuse_of(weights)`.

    Raises:
        ValueError: if there are no deltas, or if the deltas are not matrices of one shape and dtype.
    """
    if not deltas:
        raise ValueError("there are no deltas to merge: give the delta of at least one expert")
    kinds = {(tuple(delta_OI.shape), delta_OI.dtype) for delta_OI in deltas}
    if len(kinds) > 1 or deltas[0].dim() != 2:
        raise ValueError(f"the deltas must be matrices of one shape and dtype, but they have {sorted(map(str, kinds))}")
    rules = list(zip(deltas, keeps, weights, strict=True))
    fuse = fuse_of(weights)
    # The random word of an element is selected by its flat index. In a contiguous tensor, that is row * I + column.
    merged_OI = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for rows in row_blocks(merged_OI):
        start = rows.start * merged_OI.shape[1]
        # this assignment is the only rounding from float32 to the deltas' dtype
        merged_OI[rows] = fuse([keep(widened(delta_OI[rows]), start) for delta_OI, keep, _ in rules])
    return merged_OI


def _trims(deltas: Deltas, density: float, *, at_least: int = 0) -> list[Keep]:
    return [trim(threshold(delta_OI, density, at_least=at_least)) for delta_OI in deltas]


def _drops(density: float, streams: Sequence[Stream]) -> list[Keep]:
    # each entry is kept with probability `density`; dividing by `density` keeps the mean over all draws equal to d
    return [scaled(drop(density, stream), density) for stream in streams]


def _matched_drops(deltas: Deltas, density: float, streams: Sequence[Stream]) -> list[Keep]:
    return [matched(drop(density, stream), delta_OI) for delta_OI, stream in zip(deltas, streams, strict=True)]
