"""The methods on dense deltas: sparsify each expert's, then sum them or let them elect a sign, entry by entry.

All of them take the deltas delta_OI of the experts that have the module (of one shape, dtype and device) and their
weights, which may be negative, and return a new tensor of that shape, dtype and device. No argument is changed. Rows
are worked on in blocks, 16-bit floats in float32 and rounded once: beside the result next to nothing is allocated.
An expert without the module is left out of both lists: it counts as a delta of zeros, and zeros agree with nobody.

Trimming keeps the `k = int(density * count)` entries of the largest magnitude, and what ties with the k-th: k = 0
keeps nothing. (PEFT and mergekit keep exactly k, of those that tie in no order that they promise; mergekit at least 1.)
Random methods decide element i of an expert by word i of its stream.

At density 1, epsilon 0 and lambda 1 one expert of weight 1 comes back exactly, by every method. All raise ValueError
where there is no delta, where shapes or dtypes differ, or where the lists have unequal lengths.

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
    """Return `sum w trim(d)`; PEFT's magnitude_prune (peft.utils.merge_utils) is the same."""
    return _merged(deltas, weights, _trims(deltas, density), weighted_sum)


def dare_linear(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum w drop(d) / density` (arXiv 2311.03099): `linear` in expectation. PEFT's dare_linear is the same."""
    return _merged(deltas, weights, _drops(density, streams), weighted_sum)


def dare_linear_mergekit(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum w t` with `t = drop(d) |d|_1 / |drop(d)|_1`: mergekit's dare_linear, its defaults otherwise."""
    return _merged(deltas, weights, _matched_drops(deltas, density, streams), weighted_sum)


def ties(deltas: Deltas, weights: Weights, *, density: float, lambda_: float) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = trim(d)` (arXiv 2306.01708).

    The sign of `sum w t` is elected. The paper has no weights, and is met where they are equal but for its trimming
    over the whole model: see `ties_paper`. A common scale of the weights has no effect; `lambda_` is the scale to tune.
    """
    return _merged(deltas, weights, _trims(deltas, density), lambda ws: agreed_mean(ws, lambda_))


def ties_peft(deltas: Deltas, weights: Weights, *, density: float) -> Tensor:
    """Return `sum_agree w t / count_agree`, the sign of `sum t` elected: PEFT's `ties_svd` before its SVD."""
    return _merged(deltas, weights, _trims(deltas, density), agreed_mean_peft)


def ties_mergekit(deltas: Deltas, weights: Weights, *, density: float, lambda_: float) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree w`, the divisor signed: mergekit's ties with its `normalize: true`.

    Trims to at least one entry, as mergekit does.
    """
    return _merged(deltas, weights, _trims(deltas, density, at_least=1), lambda ws: agreed_mean_mergekit(ws, lambda_))


def ties_paper(
    deltas: Deltas, weights: Weights, *, density: float, lambda_: float, thresholds: Sequence[float] | None = None
) -> Tensor:
    """Return `ties` of experts that are each trimmed over all their modules at once, as the authors do.

    Weights, which the authors do not have, enter as in `ties`. (Their code keeps one entry more than k, and lets a sum
    of 0 elect the sign that is in the majority over the whole model.)

    Args:
        deltas: of this module.
        weights: of the experts.
        density: the share to keep of these deltas, where there are no thresholds.
        lambda_: scales the result.
        thresholds: the least magnitude that each expert keeps: `sparsify.global_threshold` of all its modules.
    """
    keeps = _trims(deltas, density) if thresholds is None else [trim(least) for least in thresholds]
    return _merged(deltas, weights, keeps, lambda ws: agreed_mean(ws, lambda_))


def dare_ties(deltas: Deltas, weights: Weights, *, density: float, lambda_: float, streams: Sequence[Stream]) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = drop(d) / density` (arXiv 2311.03099 with 2306.01708)."""
    return _merged(deltas, weights, _drops(density, streams), lambda ws: agreed_mean(ws, lambda_))


def dare_ties_peft(deltas: Deltas, weights: Weights, *, density: float, streams: Sequence[Stream]) -> Tensor:
    """Return `sum_agree w t / count_agree`, the sign of `sum t` elected: PEFT's `dare_ties_svd` before its SVD."""
    return _merged(deltas, weights, _drops(density, streams), agreed_mean_peft)


def dare_ties_mergekit(
    deltas: Deltas, weights: Weights, *, density: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t` with `t = drop(d) |d|_1 / |drop(d)|_1`: mergekit's, whose default is no divisor."""
    return _merged(deltas, weights, _matched_drops(deltas, density, streams), lambda ws: agreed_sum(ws, lambda_))


def della(
    deltas: Deltas, weights: Weights, *, density: float, epsilon: float, lambda_: float, streams: Sequence[Stream]
) -> Tensor:
    """Return `lambda sum_agree w t / sum_agree |w|` with `t = drop_p(d) / p` (arXiv 2406.11617).

    p rises with the rank of an entry's magnitude in its row, from `density - epsilon` to `density + epsilon`, as in
    mergekit. (The paper calls the whole width epsilon, and counts p as the probability to drop.)
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
    """Return what `fuse_of(weights)` makes of the deltas, each through its own rule of what is kept, by the block."""
    if not deltas:
        raise ValueError("a merge of no deltas")
    kinds = {(tuple(delta_OI.shape), delta_OI.dtype) for delta_OI in deltas}
    if len(kinds) > 1 or deltas[0].dim() != 2:
        raise ValueError(f"the deltas must be matrices of one shape and dtype, these are {sorted(map(str, kinds))}")
    rules = list(zip(deltas, keeps, weights, strict=True))
    fuse = fuse_of(weights)
    merged_OI = torch.empty_like(deltas[0], memory_format=torch.contiguous_format)
    for rows in row_blocks(merged_OI):
        start = rows.start * merged_OI.shape[1]
        merged_OI[rows] = fuse([keep(widened(delta_OI[rows]), start) for delta_OI, keep, _ in rules])
    return merged_OI


def _trims(deltas: Deltas, density: float, *, at_least: int = 0) -> list[Keep]:
    return [trim(threshold(delta_OI, density, at_least=at_least)) for delta_OI in deltas]


def _drops(density: float, streams: Sequence[Stream]) -> list[Keep]:
    return [scaled(drop(density, stream), density) for stream in streams]


def _matched_drops(deltas: Deltas, density: float, streams: Sequence[Stream]) -> list[Keep]:
    return [matched(drop(density, stream), delta_OI) for delta_OI, stream in zip(deltas, streams, strict=True)]
