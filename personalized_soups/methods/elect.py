"""Rules that fuse the experts' sparsified deltas into one: a weighted sum, or an election of signs (arXiv 2306.01708).

Each function takes the experts' weights and returns a function of one block t per expert, all of one shape and dtype.
That function returns a new block and changes no argument. An entry of 0 agrees with neither sign. A sum of 0 elects +,
as in PEFT and mergekit. `sum_agree` is a sum over the experts whose entry has the elected sign.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Fuse = Callable[[Sequence[Tensor]], Tensor]


def weighted_sum(weights: Sequence[float]) -> Fuse:
    """Return the fusion `sum w t`."""

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        total = parts[0] * weights[0]
        for part, weight in zip(parts[1:], weights[1:], strict=True):
            total.add_(part, alpha=weight)
        return total

    return fuse


def agreed_mean(weights: Sequence[float], lambda_: float) -> Fuse:
    """Return the fusion `lambda sum_agree w t / sum_agree |w|`; the sign of `sum w t` is elected.

    The result is 0 where no expert agrees. A negative weight flips its expert's sign and counts by its magnitude. A
    common factor of the weights has no effect.
    """
    # Weights of 1e-40 or 1e40 would leave the range of float32. A common factor cancels, and a power of two is exact.
    _, exponent = math.frexp(max(abs(weight) for weight in weights))
    shares = [math.ldexp(weight, -exponent) for weight in weights]

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        sign = _sign(weighted_sum(shares)(parts))
        gain, count = _tally(parts, sign, shares, [abs(share) for share in shares], shares)
        # where no expert agrees count and gain are both 0: any divisor above 0 gives 0 instead of NaN
        return gain.mul_(lambda_).div_(count.clamp_(min=torch.finfo(count.dtype).tiny))

    return fuse


def agreed_mean_peft(weights: Sequence[float]) -> Fuse:
    """Return the fusion `sum_agree w t / count_agree`; the sign of `sum t`, without weights, is elected.

    The result is 0 where no expert agrees. PEFT's `ties` with majority_sign_method="total" (peft.utils.merge_utils).
    """
    # PEFT weights the deltas only after the election, so a weight, even a negative one, changes no vote
    ones = [1.0] * len(weights)

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, count = _tally(parts, _sign(weighted_sum(ones)(parts)), weights, ones, ones)
        return gain.div_(count.clamp_(min=1.0))

    return fuse


def agreed_mean_mergekit(weights: Sequence[float], lambda_: float) -> Fuse:
    """Return the fusion `lambda sum_agree w t / sum_agree w`; the sign of `sum w t` is elected.

    mergekit's generalized task arithmetic with consensus "sum" and normalize. The divisor is signed: where only
    negatively weighted experts agree, the result has the sign of their delta. A divisor of 0 is replaced by 1.
    """

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, count = _tally(parts, _sign(weighted_sum(weights)(parts)), weights, weights, weights)
        # mergekit replaces a divisor of exactly 0 by 1, also where weights of both signs cancel
        return gain.mul_(lambda_).div_(count.add_(count == 0))

    return fuse


def agreed_sum(weights: Sequence[float], lambda_: float) -> Fuse:
    """Return the fusion `lambda sum_agree w t`; the sign of `sum w t` is elected.

    mergekit's generalized task arithmetic with consensus "sum", without normalize.
    """

    def fuse(parts: Sequence[Tensor]) -> Tensor:
        gain, _ = _tally(parts, _sign(weighted_sum(weights)(parts)), weights, weights, weights)
        return gain.mul_(lambda_)

    return fuse


def _sign(total: Tensor) -> Tensor:
    """Return the sign of each sum, +1 or -1; +1 for 0."""
    # copysign takes a third of the time of a comparison and torch.where. It returns -1 for -0.0, which does no harm:
    # only a sum of zeros is -0.0, and zeros agree with neither sign.
    return torch.copysign(torch.ones_like(total), total)


def _tally(
    parts: Sequence[Tensor],
    sign: Tensor,
    weights: Sequence[float],
    counts: Sequence[float],
    turns: Sequence[float],
) -> tuple[Tensor, Tensor]:
    """Return `sum_agree w t` and `sum_agree count`.

    Args:
        parts: t, one block per expert.
        sign: the elected sign of each entry.
        weights: w.
        counts: what each expert adds to the count where it agrees.
        turns: an expert with a negative number here agrees where -t has the elected sign.
    """
    gain, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for part, weight, amount, turn in zip(parts, weights, counts, turns, strict=True):
        # |t| where the expert agrees, else 0. Boolean masks would take three times as long: these operations keep one
        # dtype and work in place.
        side = math.copysign(1.0, turn)
        agreeing = (part * sign).mul_(side).clamp_(min=0.0)
        # w t = w side sign |t| where it agrees; the sign is multiplied once, after the loop
        gain.add_(agreeing, alpha=weight * side)
        count.add_(agreeing.sign_(), alpha=amount)
    return gain.mul_(sign), count
