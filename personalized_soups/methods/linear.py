"""The default merge method: the weighted sum of the experts' deltas, exact, as stacked factors.

R rank, I in features, O out features, K sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personalized_soups.methods.factors import Factors


def linear(factors: Sequence[Factors], weights: Sequence[float], basis: Sequence[int] | None = None) -> Factors:
    """Return `dW = sum_e w_e s_e B_e A_e` as factors with scaling 1: task arithmetic (arXiv 2212.04089, 2306.04488).

    The A's are stacked unchanged by rows, the B's by columns, each multiplied by `w_e s_e`. An A that several experts
    share is stored once, and their B's are summed. Experts that all share one A therefore merge at their own rank.

    Args:
        factors: one per expert, of any ranks.
        weights: one per expert; may be negative.
        basis: one number per expert, the same for experts with equal A's. By default no experts share A.

    Returns:
        a_KI and b_OK, new tensors in the factors' dtype and on their device. K is the sum of the distinct A's ranks.
        The A's are not rounded. The B's are computed in float64 and rounded once.

    Raises:
        ValueError: if there are no factors.
    """
    if not factors:
        raise ValueError("there are no factors for linear: give the factors of at least one expert")
    groups = range(len(factors)) if basis is None else basis
    # the weights go into B alone: A then keeps its bytes, and a change of weights in a live model rescales only B
    members: dict[int, list[tuple[Factors, float]]] = {}
    for each, weight, group in zip(factors, weights, groups, strict=True):
        members.setdefault(group, []).append((each, weight * each.scaling))
    bases = [own[0][0].a_RI for own in members.values()]
    first = factors[0].b_OR
    b_OK = first.new_empty(first.shape[0], sum(a_RI.shape[0] for a_RI in bases))
    start = 0
    for own in members.values():
        (each, coefficient), *others = own
        # summed in float64, so that the result is rounded once regardless of how many experts share A
        total = each.b_OR.to(torch.float64, copy=True).mul_(coefficient)
        for other, its_own in others:
            total.add_(other.b_OR, alpha=its_own)
        b_OK[:, start : start + each.rank] = total  # the only rounding
        start += each.rank
    return Factors(torch.cat(bases, dim=0), b_OK)
