"""The default method: the weighted sum of the experts' deltas, held exactly as stacked factors.

R rank, I in features, O out features, K sum of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from personalized_soups.methods.factors import Factors


def linear(factors: Sequence[Factors], weights: Sequence[float], basis: Sequence[int] | None = None) -> Factors:
    """Return `dW = sum_e w_e s_e B_e A_e` as factors with scaling 1: task arithmetic (2212.04089, 2306.04488).

    A's are put below one another as they are; B's are put side by side, each times `w_e s_e`. Experts that share an A
    take its rows once and their B's are summed, so that experts of one shared basis merge at their own rank.

    Args:
        factors: one per expert, of any ranks.
        weights: one per expert; may be negative.
        basis: one number per expert, equal for experts whose A's are equal; all different where left out.

    Returns:
        a_KI and b_OK, new tensors in the factors' dtype and on their device; K sums the ranks of the distinct A's.
        A's are not rounded; B's are computed in float64 and rounded once.

    Raises:
        ValueError: if there are no factors.
    """
    if not factors:
        raise ValueError("linear of no factors")
    a_rows: dict[int, Tensor] = {}
    b_columns: dict[int, Tensor] = {}
    groups = range(len(factors)) if basis is None else basis
    for each, weight, group in zip(factors, weights, groups, strict=True):
        coefficient = weight * each.scaling
        if group in b_columns:
            b_columns[group].add_(each.b_OR, alpha=coefficient)
        else:
            a_rows[group] = each.a_RI
            b_columns[group] = each.b_OR.double() * coefficient
    b_OK = torch.cat(list(b_columns.values()), dim=1)
    return Factors(torch.cat(list(a_rows.values()), dim=0), b_OK.to(factors[0].b_OR.dtype))
