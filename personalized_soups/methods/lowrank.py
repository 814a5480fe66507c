"""The best low-rank approximation of a sum of low-rank deltas, without forming an O x I matrix.

With `B = Q_B R_B` and `A^T = Q_A R_A`, `B A = Q_B (R_B R_A^T) Q_A^T`: the singular values are those of the small core.
The weights of a soup enter in the core alone, so that one decomposition serves every user.

O out features, I in features, R rank that is kept, K sum of ranks, E experts, N rows of a tall matrix, Q its columns'
rank (at most K).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.finite import all_finite
from personalized_soups.methods.shared_a import SharedRows

# The greatest condition number (an upper bound of it, columns scaled to length 1) at which Q = T R^-1 is left unformed.
# Q then departs from orthonormal columns by about the unit roundoff times its square, 1e-16 * 1e4**2 = 1e-8 (Yamamoto,
# Nakatsukasa, Yanagisawa, Fukaya 2015, section 2), singular values by as much of themselves (Ostrowski), and B A not at
# all, as T R^-1 R = T. Measured at the limit: 3e-11 in the product at rank R, 6e-12 in the tail.
MAX_CONDITION = 1e4
# Squared lengths of columns below this (float64's least normal number is 2e-308) have lost digits.
MIN_SQUARE = 1e-280


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


@dataclass(frozen=True, eq=False, slots=True)
class Decomposition:
    """One module of all experts, decomposed for every choice of weights.

    Column k of B belongs to expert `expert_K[k]`, and multiplies row `row_K[k]` of A.
    """

    left: _Thin
    right: _Thin
    expert_K: Tensor  # noqa: N815
    row_K: Tensor  # noqa: N815
    scalings: tuple[float, ...]

    def truncate(self, weights: Sequence[float], rank: int | None = None, energy: float | None = None) -> Truncated:
        """Return the best approximation (Eckart-Young) of `sum_e w_e s_e B_e A_e` and its error.

        The singular values are shared out evenly, `B = U sqrt(S)` and `A = sqrt(S) V^T`, so that neither factor leaves
        a 16-bit range first. Each column's sign is fixed by its largest entry. Where S_R and S_(R+1) nearly tie the
        result is not unique: its error is, its factors are not.

        Args:
            weights: one per expert; may be negative or 0.
            rank: the rank to keep; or
            energy: the least rank is kept whose squared singular values make up this share of all of them.

        Returns:
            a_RI and b_OR with scaling 1, new tensors in float64 and on the factors' device; zeros where the delta is 0.
            Their rank is `rank` or that of the stack, whichever is less. A delta whose squared norm underflows in
            float64 (a norm below 1e-154) counts as 0 in `energy` and `lost`.

        Raises:
            ValueError: if not exactly one of rank and energy is given, either is out of bounds, the number of weights
                is not that of the experts, or the delta or its squared norm is not finite.
        """
        check_cut(rank, energy)
        share = energy or 0.0
        products = [weight * scaling for weight, scaling in zip(weights, self.scalings, strict=True)]
        products_K = torch.tensor(products, dtype=torch.float64, device=self.expert_K.device)[self.expert_K]
        core = (self.left.triangle_QK * products_K) @ self.right.triangle_QK[:, self.row_K].T
        if not all_finite(core):
            raise ValueError("the delta is not finite")
        u, values, vh = torch.linalg.svd(core, full_matrices=False)
        squares = values.square()
        sums = squares.cumsum(0)
        total = float(sums[-1])
        if math.isinf(total):
            raise ValueError(f"the squared norm of a delta of norm {float(values[0]):g} is beyond float64")
        kept = min(rank or least_rank(sums, share * total), len(values))
        root = values[:kept].sqrt()
        b_OR = self.left.times(u[:, :kept] * root)
        signs = column_signs(b_OR)
        a_RI = self.right.times(vh[:kept].T * (root * signs)).T.contiguous()
        # with fewer rows than columns there are fewer singular values than K: the rest of the rank is zeros
        missing = min(rank or 0, self.right.triangle_QK.shape[1]) - kept
        factors = Factors(_padded(a_RI, missing, 0), _padded(b_OR.mul_(signs), missing, 1))
        return Truncated(factors, total, float(squares[kept:].sum()))


@dataclass(frozen=True, eq=False, slots=True)
class _Thin:
    """A tall matrix `T = Q R` with Q orthonormal: R, and Q itself or (where R is safe to divide by) T in its place."""

    tall: Tensor
    triangle_QK: Tensor  # noqa: N815
    is_orthonormal: bool

    def times(self, x_QR: Tensor) -> Tensor:
        """Return the new tensor `Q @ x`; as `T @ (R^-1 x)` where Q was not formed."""
        if not self.is_orthonormal:
            x_QR = torch.linalg.solve_triangular(self.triangle_QK, x_QR, upper=True)
        return self.tall @ x_QR


def decompose(factors: Sequence[Factors], basis: Sequence[int] | None = None) -> Decomposition:
    """Return the decomposition of one module's stack, from which each soup of it is truncated.

    Args:
        factors: one per expert, of any ranks.
        basis: one number per expert, equal for experts whose A's are equal (their rows are taken once); all different
            where left out.

    dtype and device: float64, on the factors' device. Factors of one expert in float64 may be held, not copied: they
    must not change while the decomposition is used.

    Raises:
        ValueError: if there are no factors.
    """
    if not any(each.rank for each in factors):
        raise ValueError("decompose of no factors")
    ranks = [each.rank for each in factors]
    rows = SharedRows.of(range(len(factors)) if basis is None else basis, ranks)
    expert_K = [index for index, rank in enumerate(ranks) for _ in range(rank)]
    device = factors[0].a_RI.device
    return Decomposition(
        left=_thin([each.b_OR for each in factors]),
        right=_thin([factors[index].a_RI.T for index in rows.firsts]),
        expert_K=torch.tensor(expert_K, device=device),
        row_K=torch.tensor(rows.row_K, device=device),
        scalings=tuple(each.scaling for each in factors),
    )


def truncate(factors: Factors, rank: int | None = None, energy: float | None = None) -> Truncated:
    """Return the best approximation of one delta: `Decomposition.truncate` of a single expert of weight 1."""
    check_cut(rank, energy)
    return decompose([factors]).truncate([1.0], rank, energy)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raise ValueError unless exactly one is given: a rank of at least 1, or an energy share in (0, 1]."""
    if (rank is None) == (energy is None):
        raise ValueError(f"exactly one of rank and energy is needed, these are {rank} and {energy}")
    if rank is not None and rank <= 0:
        raise ValueError(f"the rank must be positive, this is {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy must be a share in (0, 1], this is {energy}")


def least_rank(sums: Tensor, wanted: float) -> int:
    """Return how many squared singular values make up what is wanted; one more than there are if all do not.

    Args:
        sums: of the squared singular values, the greatest first, up to each.
        wanted: an energy share times the energy.
    """
    return int(torch.searchsorted(sums, wanted)) + 1


def column_signs(b_OR: Tensor) -> Tensor:
    """Return, for each column, the sign (1 or -1) of its entry of the largest magnitude; 1 for a column of zeros."""
    largest = b_OR.abs().argmax(dim=0, keepdim=True)
    return torch.where(b_OR.gather(0, largest)[0] < 0, -1.0, 1.0).to(b_OR.dtype)


def _thin(parts: Sequence[Tensor]) -> _Thin:
    tall_NK = torch.cat([part.double() for part in parts], dim=1) if len(parts) > 1 else parts[0].double()
    triangle_KK = _cholesky(tall_NK)
    if triangle_KK is not None:
        return _Thin(tall_NK, triangle_KK, is_orthonormal=False)
    # survives what Cholesky does not: zero columns, doubled experts, more columns than rows
    orthonormal_NQ, triangle_QK = torch.linalg.qr(tall_NK)
    return _Thin(orthonormal_NQ, triangle_QK, is_orthonormal=True)


def _cholesky(tall_NK: Tensor) -> Tensor | None:
    """Return R of `T = Q R` from the Cholesky factor of T^T T, six times as fast as QR; None where it is not safe.

    The columns are scaled to length 1 first, which a triangular factor bears without error: what counts is the angle
    between columns, not how far their lengths are apart.
    """
    gram_KK = tall_NK.T @ tall_NK
    lengths = gram_KK.diagonal().sqrt()
    # comparisons are put so that NaN and infinity fail them
    if not float(gram_KK.diagonal().min()) >= MIN_SQUARE:
        return None
    lower, failed = torch.linalg.cholesky_ex(gram_KK / torch.outer(lengths, lengths))
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    # Frobenius norms bound the spectral ones from above; that of a factor with rows of length 1 is sqrt(K)
    if int(failed) or not len(lower) ** 0.5 * float(inverse.norm()) <= MAX_CONDITION:
        return None
    triangle: Tensor = lower.T * lengths
    return triangle


def _padded(tensor: Tensor, missing: int, dim: int) -> Tensor:
    if missing <= 0:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
