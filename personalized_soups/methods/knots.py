"""KnOTS: TIES in the common basis of what the experts put out. Factors in, factors out: no dense delta is formed.

E experts, R rank of one, K sum of ranks, O out features, I in features, D directions of the common basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personalized_soups.methods.dense import ties
from personalized_soups.methods.factors import Factors


def knots(factors: Sequence[Factors], weights: Sequence[float], *, density: float, lambda_: float) -> Factors:
    """Return `U ties(S V_e)` where `[d_1 ... d_E] = U S [V_1 ... V_E]` (arXiv 2410.19735), as factors with scaling 1.

    `S V_e = U^T d_e` is expert e's delta seen in the basis U of all experts' outputs; as in the authors' released
    configurations it is the scaled V that is trimmed, so that an entry counts by what it contributes. They trim over
    the whole model, this over the module. The election and its mean do not depend on the scale of V. Where singular
    values nearly tie, U is not unique, and the result depends on it.

    Args:
        factors: of the experts that have this module, of any ranks.
        weights: theirs, as in `ties`.
        density: share of entries that each expert keeps, of the directions with a singular value above rounding.
        lambda_: scales the result.

    Returns:
        a_DI and b_OD in the factors' dtypes and on their device, computed in float64 and rounded once; D is
        `min(O, sum min(I, R))`, with zeros for directions that no delta has. No argument is changed.

    Raises:
        ValueError: if there are no factors.
    """
    if not factors:
        raise ValueError("knots of no factors")
    q_OD, basis = torch.linalg.qr(torch.cat([each.b_OR.double() * each.scaling for each in factors], dim=1))
    # A_e^T = Q_e R_e, so that [d_1 ... d_E] = Q (R diag(R_e^T)) diag(Q_e^T): the SVD is that of a K x K core
    inputs = [torch.linalg.qr(each.a_RI.double().T) for each in factors]
    core = basis @ torch.block_diag(*[r.T for _, r in inputs])
    u, s_D, v = torch.linalg.svd(core, full_matrices=False)
    is_there = s_D > s_D[0] * max(core.shape) * torch.finfo(torch.float64).eps
    seen = torch.split(s_D[:, None] * v, [q.shape[1] for q, _ in inputs], dim=1)
    a_DI = torch.zeros(len(s_D), factors[0].a_RI.shape[1], dtype=torch.float64, device=core.device)
    a_DI[is_there] = ties(
        [part[is_there] @ q.T for part, (q, _) in zip(seen, inputs, strict=True)],
        weights,
        density=density,
        lambda_=lambda_,
    )
    # shared out evenly, so that neither factor leaves a 16-bit range first
    root_D = torch.where(is_there, s_D, 1.0).sqrt()
    return Factors(
        (a_DI / root_D[:, None]).to(factors[0].a_RI.dtype),
        ((q_OD @ u) * (root_D * is_there)).to(factors[0].b_OR.dtype),
    )
