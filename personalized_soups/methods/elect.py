"""How the sparsified deltas of several experts become one: their weighted sum, or an election of signs.

Every function takes one block per expert, of one shape and dtype, and their weights; it returns a new block and
changes none. An entry that is 0 agrees with nobody. A sum of 0 elects +, as in PEFT and mergekit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Fuse = Callable[[Sequence[Tensor]], Tensor]


def weighted_sum(weights: Sequence[float]) -> Fuse:
    """Sum `w t`."""

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        total = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        return total

    return fuse


def agreed_mean(weights: Sequence[float], lambda_: float) -> Fuse:
    """Elect the sign of `sum w t`; `lambda sum_agree w t / sum_agree |w|`, and 0 where none agrees.

    A negative weight turns its expert's sign and counts by its magnitude. A common scale of the weights has no effect.
    """
    # so that no weight, however small or large, leaves float32's range; by a power of two, which rounds nothing
    _, exponent = math.frexp(max(abs(weight) for weight in weights))
    shares = [math.ldexp(weight, -exponent) for weight in weights]

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        sign = _sign(weighted_sum(shares)(parts))
        gain, count = _tally(parts, sign, shares, [abs(share) for share in shares], shares)
        # at a count of 0 the gain is 0 too
        return gain.mul_(lambda_).div_(count.clamp_(min=torch.finfo(count.dtype).tiny))

    return fuse


def agreed_mean_peft(weights: Sequence[float]) -> Fuse:
    """Elect the sign of `sum t`, without the weights; `sum_agree w t / count_agree`, and 0 where none agrees.

    PEFT's `ties` with majority_sign_method="total" (peft.utils.merge_utils).
    """
    ones = [1.0] * len(weights)

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, count = _tally(parts, _sign(weighted_sum(ones)(parts)), weights, ones, ones)
        return gain.div_(count.clamp_(min=1.0))

    return fuse


def agreed_mean_mergekit(weights: Sequence[float], lambda_: float) -> Fuse:
    """Elect the sign of `sum w t`; `lambda sum_agree w t / sum_agree w`, divided by 1 where that sum is 0.

    mergekit's generalized task arithmetic with consensus "sum" and normalize. The divisor is signed: where only
    negatively weighted experts agree, the result has their delta's own sign.
    """

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, count = _tally(parts, _sign(weighted_sum(weights)(parts)), weights, weights, weights)
        return gain.mul_(lambda_).div_(count.add_(count == 0))

    return fuse


def agreed_sum(weights: Sequence[float], lambda_: float) -> Fuse:
    """Elect the sign of `sum w t`; `lambda sum_agree w t`: mergekit's consensus "sum" without normalize."""

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, _ = _tally(parts, _sign(weighted_sum(weights)(parts)), weights, weights, weights)
        return gain.mul_(lambda_)

    return fuse


def _sign(total: Tensor) -> Tensor:
    """Return +1 and -1 in place of a sum, +1 for 0; copysign costs a third of a comparison and a choice."""
    return torch.copysign(torch.ones_like(total), total)  # -0 is a sum of zeros alone, and these agree with nobody


def _tally(
    parts: Sequence[Tensor],
    sign: Tensor,
    weights: Sequence[float],
    counts: Sequence[float],
    turns: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return `sum_agree w t` and `sum_agree count`; an expert agrees where t, turned as `turns` is, has the sign."""
    gain, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, weight, each, turn in zip(parts, weights, counts, turns, strict=True):
        # comparisons and masks would take three times as long as these, which are all of one dtype
        side = math.copysign(1.0, turn)
        agreeing = (part * sign).mul_(side).clamp_(min=0.0)
        gain.add_(agreeing, alpha=weight * side)
        count.add_(agreeing.sign_(), alpha=each)
    return gain.mul_(sign), count
