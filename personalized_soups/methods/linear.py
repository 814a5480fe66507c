"""`linear`, the default merge method: the exact weighted sum of the experts' deltas, as stacked factors.

Shapes: R = rank of an expert, I = in_features, O = out_features, K = sum of the ranks of the distinct A's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personalized_soups.methods.factors import Factors


def linear(factors: Sequence[Factors], weights: Sequence[float], basis: Sequence[int] | None = None) -> Factors:
    """Return `dW = sum_e w_e s_e B_e A_e` as factors with scaling 1: task arithmetic (arXiv 2212.04089, 2306.04488).

    `w_e`, `s_e`, `B_e` and `A_e` are the weight, the scaling and the factors of expert e. The rows of the A's are
    stacked unchanged. The columns of the B's are stacked too, each B multiplied by `w_e s_e`. An A that several experts
    share is stored once, and the B's of these experts are summed. So if all experts share one A, the result has the
    rank of one expert.

    Args:
        factors: one per expert. The ranks may differ.
        weights: one per expert. A weight may be negative.
        basis: one number per expert. Experts with equal numbers must have equal A's. By default, no experts share A.

    Returns:
        a_KI and b_OK, new tensors with the dtype and the device of the factors. A is not rounded. B is computed in
        float64 and rounded once.

    Raises:
        ValueError: if there are no factors.
    """
    if not factors:
        raise ValueError("there are no factors for linear: give the factors of at least one expert")
    groups = range(len(factors)) if basis is None else basis
    # The weights are applied to B only. The bytes of A do not change, and other weights in a live model rescale only B.
    members: dict[int, list[tuple[Factors, float]]] = {}
    for each, weight, group in zip(factors, weights, groups, strict=True):
        members.setdefault(group, []).append((each, weight * each.scaling))
    bases = [own[0][0].a_RI for own in members.values()]
    first = factors[0].b_OR
    b_OK = first.new_empty(first.shape[0], sum(a_RI.shape[0] for a_RI in bases))
    start = 0
    for own in members.values():
        (each, coefficient), *others = own
        # summed in float64, so that the result is rounded once even if several experts share A
        total = each.b_OR.to(torch.float64, copy=True).mul_(coefficient)
        for other, its_own in others:
            total.add_(other.b_OR, alpha=its_own)
        b_OK[:, start : start + each.rank] = total  # the only rounding
        start += each.rank
    return Factors(torch.cat(bases, dim=0), b_OK)
