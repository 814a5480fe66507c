"""KnOTS (arXiv 2410.19735): TIES in a basis that all experts' outputs share. No dense delta is formed.

Shapes: E = number of experts, R = rank of an expert, K = sum of the experts' ranks, O = out_features, I = in_features,
D = number of directions of the shared basis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from personalized_soups.methods.dense import ties
from personalized_soups.methods.factors import Factors


def knots(factors: Sequence[Factors], weights: Sequence[float], *, density: float, lambda_: float) -> Factors:
    """Return `U ties(S V_e)` as factors with scaling 1, where `[d_1 ... d_E] = U S [V_1 ... V_E]` (arXiv 2410.19735).

    `d_e` is the delta of expert e. U, S and V are the singular value decomposition of the deltas side by side.
    `S V_e = U^T d_e` is the delta of expert e in the basis U. TIES trims `S V_e`, as in the authors' released
    configurations, so an entry counts by its contribution to the delta. The authors trim over the whole model, but this
    function trims over one module. The elected signs and the mean do not depend on the scale of V. If some singular
    values are nearly equal, U is not unique, and the result depends on the choice of U.

    Args:
        factors: one per expert that adapts this module. The ranks may differ.
        weights: one per element of `factors`, with the same effect as in `ties`.
        density: the share of entries that each expert keeps. Only directions count whose singular value is larger than
            a rounding error.
        lambda_: the factor of the result.

    Returns:
        a_DI and b_OD with the dtypes and the device of the factors. They are computed in float64 and rounded once. D is
        `min(O, sum min(I, R))`. The factors of directions that no delta has are zeros. No argument is changed.

    Raises:
        ValueError: if there are no factors.
    """
    if not factors:
        raise ValueError("there are no factors for knots: give the factors of at least one expert")
    q_OD, basis = torch.linalg.qr(torch.cat([each.b_OR.double() * each.scaling for each in factors], dim=1))
    # With B = Q R and A_e^T = Q_e R_e, [d_1 ... d_E] = Q (R diag(R_e^T)) diag(Q_e^T). Q and diag(Q_e^T) are
    # orthonormal, so the SVD of the K x K core in the middle gives the SVD of the O x (E I) matrix.
    inputs = [torch.linalg.qr(each.a_RI.double().T) for each in factors]
    core = basis @ torch.block_diag(*[r.T for _, r in inputs])
    u, s_D, v = torch.linalg.svd(core, full_matrices=False)
    # the usual definition of the numerical rank: singular values up to this bound are rounding errors
    is_there = s_D > s_D[0] * max(core.shape) * torch.finfo(torch.float64).eps
    seen = torch.split(s_D[:, None] * v, [q.shape[1] for q, _ in inputs], dim=1)
    a_DI = torch.zeros(len(s_D), factors[0].a_RI.shape[1], dtype=torch.float64, device=core.device)
    a_DI[is_there] = ties(
        [part[is_there] @ q.T for part, (q, _) in zip(seen, inputs, strict=True)],
        weights,
        density=density,
        lambda_=lambda_,
    )
    # Each factor is multiplied by the root of S, so that no factor overflows or underflows 16 bits before the other.
    # For a missing direction, the row of A is divided by 1 instead of 0, and the column of B is 0.
    root_D = torch.where(is_there, s_D, 1.0).sqrt()
    return Factors(
        (a_DI / root_D[:, None]).to(factors[0].a_RI.dtype),
        ((q_OD @ u) * (root_D * is_there)).to(factors[0].b_OR.dtype),
    )
