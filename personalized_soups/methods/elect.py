"""Rules that fuse the experts' sparsified deltas into one delta, with or without an election of signs.

Each public function takes the experts' weights and returns a fusion. A fusion is a function that takes one block t per
expert and returns a new block. All blocks have one shape and dtype. The fusion changes no argument.

In the formulas, w is an expert's weight. Each entry elects a sign (arXiv 2306.01708); a sum of 0 elects +, as in PEFT
and mergekit. `sum_agree` and `count_agree` are the sum over, and the number of, the experts whose entry has the elected
sign. An entry of 0 agrees with neither sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Fuse = Callable[[Sequence[Tensor]], Tensor]


def weighted_sum(weights: Sequence[float]) -> Fuse:
    """Return the fusion that computes `sum w t`."""

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        total = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        return total

    return fuse


def agreed_mean(weights: Sequence[float], lambda_: float) -> Fuse:
    """Return the fusion that computes `lambda sum_agree w t / sum_agree |w|`.

    The elected sign is the sign of `sum w t`. The result is 0 where no expert agrees. An expert with a negative weight
    votes with the opposite sign of its entry, and adds the magnitude of its weight to the divisor. A common factor of
    all weights has no effect.
    """
    # Weights such as 1e-40 or 1e40 are outside of the range of float32. Dividing all weights by one power of two is
    # exact, and this common factor cancels in the result.
    _, exponent = math.frexp(max(abs(weight) for weight in weights))
    shares = [math.ldexp(weight, -exponent) for weight in weights]

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        sign = _sign(weighted_sum(shares)(parts))
        gain, count = _tally(parts, sign, shares, [abs(share) for share in shares], shares)
        # where no expert agrees, count and gain are both 0, and any divisor above 0 gives 0 instead of NaN
        return gain.mul_(lambda_).div_(count.clamp_(min=torch.finfo(count.dtype).tiny))

    return fuse


def agreed_mean_peft(weights: Sequence[float]) -> Fuse:
    """Return the fusion that computes `sum_agree w t / count_agree`.

    The elected sign is the sign of `sum t`, without the weights. The result is 0 where no expert agrees. PEFT's `ties`
    does the same with majority_sign_method="total" (peft.utils.merge_utils).
    """
    # PEFT multiplies by the weights only after the election, so no weight, not even a negative one, changes a vote
    ones = [1.0] * len(weights)

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, count = _tally(parts, _sign(weighted_sum(ones)(parts)), weights, ones, ones)
        return gain.div_(count.clamp_(min=1.0))

    return fuse


def agreed_mean_mergekit(weights: Sequence[float], lambda_: float) -> Fuse:
    """Return the fusion that computes `lambda sum_agree w t / sum_agree w`.

    mergekit's generalized task arithmetic does the same with the consensus method "sum" and `normalize`. The elected
    sign is the sign of `sum w t`. The divisor can be negative: where only experts with negative weights agree, the
    result has the sign of their entries. A divisor of 0 is replaced by 1.
    """

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, count = _tally(parts, _sign(weighted_sum(weights)(parts)), weights, weights, weights)
        # mergekit replaces a divisor of exactly 0 by 1; weights of both signs that cancel also give such a divisor
        return gain.mul_(lambda_).div_(count.add_(count == 0))

    return fuse


def agreed_sum(weights: Sequence[float], lambda_: float) -> Fuse:
    """Return the fusion that computes `lambda sum_agree w t`.

    mergekit's generalized task arithmetic does the same with the consensus method "sum" and without `normalize`. The
    elected sign is the sign of `sum w t`.
    """

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, _ = _tally(parts, _sign(weighted_sum(weights)(parts)), weights, weights, weights)
        return gain.mul_(lambda_)

    return fuse


def _sign(total: Tensor) -> Tensor:
    """Return +1 for each sum that is at least 0, and -1 for each sum below 0."""
    # copysign takes a third of the time of a comparison and torch.where. It returns -1 for -0.0. That has no effect:
    # only a sum of zeros is -0.0, and an entry of 0 agrees with neither sign.
    return torch.copysign(torch.ones_like(total), total)


def _tally(
    parts: Sequence[Tensor],
    sign: Tensor,
    weights: Sequence[float],
    counts: Sequence[float],
    turns: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return `sum_agree w t` and `sum_agree count`, where `count` is an expert's number in `counts`.

    Args:
        parts: the block t of each expert.
        sign: the elected sign of each entry.
        weights: the weight w of each expert.
        counts: the number that each expert adds to the second sum where the expert agrees.
        turns: one number per expert. If the number is negative, the expert agrees where -t has the elected sign.
    """
    gain, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, weight, amount, turn in zip(parts, weights, counts, turns, strict=True):
        # `agreeing` is |t| where the expert agrees, else 0. These operations keep one dtype and work in place. Boolean
        # masks would take three times as long.
        side = math.copysign(1.0, turn)
        agreeing = (part * sign).mul_(side).clamp_(min=0.0)
        # where the expert agrees, w t = w side sign |t|; the sign is multiplied once, after the loop
        gain.add_(agreeing, alpha=weight * side)
        count.add_(agreeing.sign_(), alpha=amount)
    return gain.mul_(sign), count
