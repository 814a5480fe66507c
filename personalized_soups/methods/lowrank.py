"""The best rank-k approximation of a sum of low-rank deltas, without forming an O x I matrix.

`B = Q_B R_B` and `A^T = Q_A R_A` (Householder QR), so `B A = Q_B (R_B R_A^T) Q_A^T`: the singular values are those of
the K x K core. QR survives rank-deficient stacks (zero weights, doubled experts, B = 0), where the Gram matrix's
Cholesky factor fails.

O out features, I in features, K rank of the input, R rank asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.methods.factors import Factors


@dataclass(frozen=True, eq=False, slots=True)
class Truncated:
    """Factors of rank at most R, and what was lost: squared Frobenius norms of the delta and of its tail."""

    factors: Factors
    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """`|dW - dW_R| / |dW|` in the Frobenius norm; 0 where dW is 0."""
        return float((self.lost / self.energy) ** 0.5) if self.energy > 0 else 0.0


def truncate(factors: Factors, rank: int) -> Truncated:
    """Return the best approximation of the delta at `rank` (Eckart-Young) and its error.

    The singular values are shared out evenly, `B = U sqrt(S)` and `A = sqrt(S) V^T`, so that neither factor leaves a
    16-bit range first. Each column's sign is fixed by its largest entry. Where S_R and S_(R+1) nearly tie the result
    is not unique: its error is, its factors are not.

    Returns:
        a_RI and b_OR with scaling 1, in float64 and on the factors' device; zeros where the delta is 0. The rank is
        `rank` or that of the input, whichever is less.

    Raises:
        ValueError: if `rank` is not positive.
    """
    if rank <= 0:
        raise ValueError(f"the rank must be positive, this is {rank}")
    kept = min(rank, factors.rank)
    q_b, r_b = torch.linalg.qr(factors.b_OR.double() * factors.scaling)
    q_a, r_a = torch.linalg.qr(factors.a_RI.double().T)
    left, values, right = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    energy = float(values.square().sum())
    lost = float(values[kept:].square().sum())
    root = values[:kept].sqrt()
    b_OR = (q_b @ left[:, :kept]) * root
    a_RI = root[:, None] * (q_a @ right[:kept].T).T
    signs = _signs(b_OR)
    # QR of a stack with more columns than rows has fewer singular values than K: the rest of the rank is zeros
    missing = kept - b_OR.shape[1]
    return Truncated(
        Factors(_padded(signs[:, None] * a_RI, missing, 0), _padded(b_OR * signs, missing, 1)), energy, lost
    )


def _signs(b_OR: Tensor) -> Tensor:
    largest = b_OR.abs().argmax(dim=0, keepdim=True)
    return torch.where(b_OR.gather(0, largest)[0] < 0, -1.0, 1.0).to(b_OR.dtype)


def _padded(tensor: Tensor, missing: int, dim: int) -> Tensor:
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
