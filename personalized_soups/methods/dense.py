"""Merge methods on dense deltas: sparsify each expert's delta, then sum the deltas or elect a sign for each entry.

Each method takes one delta_OI per expert that adapts the module (all of one shape, dtype and device) and one weight per
expert, which may be negative. It returns a new tensor of that shape, dtype and device, and changes no argument. The
methods work on blocks of rows, so they allocate little in addition to the result. 16-bit deltas are computed in float32
and rounded once. An expert that does not adapt the module is left out of both lists: its delta is 0, and zeros agree
with neither sign.

Trimming keeps the `k = int(density * count)` entries of the largest magnitude and all entries that tie with the k-th;
k = 0 keeps none. (PEFT and mergekit keep exactly k entries and do not say which of the tied ones. mergekit keeps at
least one.) Random methods decide element i of an expert by word i of the expert's stream.

With density 1, epsilon 0 and lambda 1, every method returns the delta of a single expert of weight 1 exactly. All
methods raise ValueError if there is no delta, if shapes or dtypes differ, or if the lists have unequal lengths.

In the formulas, d is an expert's delta, w its weight, and `sum_agree` sums over the experts whose entry has the elected
sign.

O out features, I in features.
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
    """Return `sum w trim(d)`, as PEFT's magnitude_prune (peft.utils.merge_utils) does."""
    return _merged(deltas, weights, _trims(deltas, density), weighted_sum)


def dare_linear(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum w drop(d) / density` (arXiv 2311.03099), as PEFT's dare_linear does.

    Its expectation over the random draws is `linear`.
    """
    return _merged(deltas, weights, _drops(density, streams), weighted_sum)


def dare_linear_mergekit(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum w t` with `t = drop(d) |d|_1 / |drop(d)|_1`: mergekit's dare_linear with its default options."""
    return _merged(deltas, weights, _matched_drops(deltas, density, streams), weighted_sum)


def ties(deltas: Deltas, weights: Weights, *, density: float, lambda_: float) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = trim(d)` (arXiv 2306.01708).

    The sign of `sum w t` is elected. The paper has no weights. With equal weights this is the paper's rule, except that
    the paper trims over the whole model: see `ties_paper`. A common factor of the weights has no effect; tune `lambda_`
    instead.
    """
    return _merged(deltas, weights, _trims(deltas, density), lambda ws: agreed_mean(ws, lambda_))


def ties_peft(deltas: Deltas, weights: Weights, *, density: float) -> Tensor:
    """Return `sum_agree w t / count_agree`; the sign of `sum t` is elected: PEFT's `ties_svd` before its SVD."""
    return _merged(deltas, weights, _trims(deltas, density), agreed_mean_peft)


def ties_mergekit(deltas: Deltas, weights: Weights, *, density: float, lambda_: float) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree w` with `t = trim(d)`: mergekit's ties with its `normalize: true`.

    The divisor is signed. Trimming keeps at least one entry, as in mergekit.
    """
    return _merged(deltas, weights, _trims(deltas, density, at_least=1), lambda ws: agreed_mean_mergekit(ws, lambda_))


def ties_paper(
    deltas: Deltas, weights: Weights, *, density: float, lambda_: float, thresholds: Sequence[float] | None = None
) -> Tensor:
    """Return `ties` with each expert trimmed over all of its modules at once, as the authors' code does.

    The authors have no weights; weights enter as in `ties`. (Their code keeps k + 1 entries, and a sum of 0 elects the
    majority sign of the whole model.)

    Args:
        deltas: the experts' deltas of this module.
        weights: the experts' weights.
        density: the share of these deltas to keep if `thresholds` is None.
        lambda_: a factor on the result.
        thresholds: the least magnitude that each expert keeps, from `sparsify.global_threshold` of all its modules.
    """
    keeps = _trims(deltas, density) if thresholds is None else [trim(least) for least in thresholds]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean(ws, lambda_))


def dare_ties(deltas: Deltas, weights: Weights, *, density: float, lambda_: float, streams: Sequence[Stream]) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = drop(d) / density` (arXiv 2311.03099 with 2306.01708)."""
    return _merged(deltas, weights, _drops(density, streams), lambda ws: agreed_mean(ws, lambda_))


def dare_ties_peft(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum_agree w t / count_agree` with `t = drop(d) / density`: PEFT's `dare_ties_svd` before its SVD.

    The sign of `sum t` is elected.
    """
    return _merged(deltas, weights, _drops(density, streams), agreed_mean_peft)


def dare_ties_mergekit(
    deltas: Deltas, weights: Weights, *, density: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t` with `t = drop(d) |d|_1 / |drop(d)|_1`: mergekit's dare_ties.

    mergekit's default for this method is `normalize: false`, so there is no divisor.
    """
    return _merged(deltas, weights, _matched_drops(deltas, density, streams), lambda ws: agreed_sum(ws, lambda_))


def della(
    deltas: Deltas, weights: Weights, *, density: float, epsilon: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = drop_p(d) / p` (arXiv 2406.11617).

    p rises with the rank of an entry's magnitude in its row, from `density - epsilon` to `density + epsilon`, as in
    mergekit. (In the paper epsilon is the whole width of the range, and p is the probability to drop an entry.)
    """
    keeps = [drop_small(density, epsilon, stream, rescales=True) for stream in streams]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean(ws, lambda_))


def della_mergekit(
    deltas: Deltas, weights: Weights, *, density: float, epsilon: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree w` with `t = drop_p(d) |d|_1 / |drop_p(d)|_1`: mergekit's della."""
    keeps = [
        matched(drop_small(density, epsilon, stream, rescales=False), delta_OI)
        for delta_OI, stream in zip(deltas, streams, strict=True)
    ]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean_mergekit(ws, lambda_))


def _merged(deltas: Deltas, weights: Weights, keeps: Iterable[Keep], fuse_of: Callable[[Weights], Fuse]) -> Tensor:
    """Sparsify each delta by its own rule in `keeps`, fuse them by `fuse_of(weights)`, and return the result."""
    if not deltas:
        raise ValueError("there are no deltas to merge: give the delta of at least one expert")
    kinds = {(tuple(delta_OI.shape), delta_OI.dtype) for delta_OI in deltas}
    if len(kinds) > 1 or deltas[0].dim() != 2:
        raise ValueError(f"the deltas must be matrices of one shape and dtype, but they have {sorted(map(str, kinds))}")
    rules = list(zip(deltas, keeps, weights, strict=True))
    fuse = fuse_of(weights)
    # contiguous, so that the flat index of an element, which selects its random word, is row * I + column
    merged_OI = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for rows in row_blocks(merged_OI):
        start = rows.start * merged_OI.shape[1]
        # the assignment rounds float32 to the deltas' dtype, once
        merged_OI[rows] = fuse([keep(widened(delta_OI[rows]), start) for delta_OI, keep, _ in rules])
    return merged_OI


def _trims(deltas: Deltas, density: float, *, at_least: int = 0) -> list[Keep]:
    return [trim(threshold(delta_OI, density, at_least=at_least)) for delta_OI in deltas]


def _drops(density: float, streams: Sequence[Stream]) -> list[Keep]:
    # an entry is kept with probability `density`: dividing by it makes the expectation that of the whole delta
    return [scaled(drop(density, stream), density) for stream in streams]


def _matched_drops(deltas: Deltas, density: float, streams: Sequence[Stream]) -> list[Keep]:
    return [matched(drop(density, stream), delta_OI) for delta_OI, stream in zip(deltas, streams, strict=True)]
