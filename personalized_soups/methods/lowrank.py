"""The best low-rank approximation of a sum of low-rank deltas, without forming an O x I matrix.

With `B = Q_B R_B` and `A^T = Q_A R_A`, `B A = Q_B (R_B R_A^T) Q_A^T`: B A has the singular values of the K x K core
`R_B R_A^T`. Only the core depends on the weights of a soup, so one decomposition serves all users.

O out features, I in features, R rank that is kept, K sum of ranks, E experts, N rows of a tall matrix, Q rank of its
columns (at most K).
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

# The fast path (Cholesky) is used up to this condition number of T with its columns scaled to length 1. The columns of
# Q = T R^-1 then depart from orthonormal ones by about the unit roundoff times the squared condition number,
# 1e-16 * 1e4**2 = 1e-8 (Yamamoto, Nakatsukasa, Yanagisawa, Fukaya 2015, section 2). Singular values have at most the
# same relative error (Ostrowski). The full product B A has none, since T R^-1 R = T. Measured at the limit: 3e-11 in
# the product at rank R, 6e-12 in the tail.
MAX_CONDITION = 1e4
# Squared lengths of columns below this have lost digits: float64's least normal number is 2e-308.
MIN_SQUARE = 1e-280


@dataclass(frozen=True, eq=False, slots=True)
class Truncated:
    """A low-rank approximation and its error.

    Attributes:
        factors: the approximation, of rank at most R.
        energy: the squared Frobenius norm of the whole delta.
        lost: the squared Frobenius norm of the difference.
    """

    factors: Factors
    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """`|dW - dW_R| / |dW|` in the Frobenius norm; 0 if dW is 0."""
        return float((self.lost / self.energy) ** 0.5) if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Decomposition:
    """One module of all experts, decomposed once for all choices of weights.

    Attributes:
        left: the decomposition of the stacked B's.
        right: the decomposition of the distinct A's, transposed.
        expert_K: the expert to which each column of B belongs.
        row_K: the row of the distinct A's that each column of B multiplies.
        scalings: the experts' scalings.
    """

    left: _Thin
    right: _Thin
    expert_K: Tensor  # noqa: N815
    row_K: Tensor  # noqa: N815
    scalings: tuple[float, ...]

    def truncate(self, weights: Sequence[float], rank: int | None = None, energy: float | None = None) -> Truncated:
        """Return the best approximation (Eckart-Young) of `sum_e w_e s_e B_e A_e` and its error.

        Each factor takes the root of the singular values, `B = U sqrt(S)` and `A = sqrt(S) V^T`, so that neither
        overflows or underflows 16 bits before the other. Each column of B has the sign that makes its largest entry
        positive. If S_R and S_(R+1) nearly tie, the factors are not unique; the error is.

        Args:
            weights: one per expert; may be negative or 0.
            rank: the rank to keep.
            energy: the share of the squared singular values to keep, in place of a rank: the least sufficient rank is
                used.

        Returns:
            a_RI and b_OR with scaling 1, new tensors in float64 and on the factors' device; zeros if the delta is 0.
            Their rank is the smaller of `rank` and the stack's. A delta whose squared norm underflows in float64 (a
            norm below 1e-154) counts as 0 in `energy` and `lost`.

        Raises:
            ValueError: if not exactly one of rank and energy is given, if it is out of bounds, if there is not one
                weight per expert, or if the delta or its squared norm is not finite.
        """
        check_cut(rank, energy)
        share = energy or 0.0
        products = [weight * scaling for weight, scaling in zip(weights, self.scalings, strict=True)]
        products_K = torch.tensor(products, dtype=torch.float64, device=self.expert_K.device)[self.expert_K]
        # K x K: the only part that depends on the weights
        core = (self.left.triangle_QK * products_K) @ self.right.triangle_QK[:, self.row_K].T
        if not all_finite(core):
            raise ValueError("the delta contains NaN or infinity, so it is not finite")
        u, values, vh = torch.linalg.svd(core, full_matrices=False)
        squares = values.square()
        sums = squares.cumsum(0)
        total = float(sums[-1])
        # a finite delta of a norm above 1e154 has a squared norm beyond float64
        if math.isinf(total):
            raise ValueError(f"the delta's norm is {float(values[0]):g} or more, and its square overflows float64")
        kept = min(rank or least_rank(sums, share * total), len(values))
        root = values[:kept].sqrt()
        b_OR = self.left.times(u[:, :kept] * root)
        # an SVD leaves the signs open, and LAPACK versions differ: fixed signs make the files reproducible
        signs = column_signs(b_OR)
        a_RI = self.right.times(vh[:kept].T * (root * signs)).T.contiguous()
        # If O or I is less than K, there are fewer than K singular values. Zeros fill the requested rank.
        missing = min(rank or 0, self.right.triangle_QK.shape[1]) - kept
        factors = Factors(_padded(a_RI, missing, 0), _padded(b_OR.mul_(signs), missing, 1))
        return Truncated(factors, total, float(squares[kept:].sum()))


@dataclass(frozen=True, eq=False, slots=True)
class _Thin:
    """The decomposition `T = Q R` of a tall matrix, with orthonormal Q.

    Attributes:
        tall: Q, or T if R is well conditioned: `Q x = T (R^-1 x)` then costs less than forming Q.
        triangle_QK: R, upper triangular.
        is_orthonormal: whether `tall` is Q.
    """

    tall: Tensor
    triangle_QK: Tensor  # noqa: N815
    is_orthonormal: bool

    def times(self, x_QR: Tensor) -> Tensor:
        """Return `Q @ x`, a new tensor."""
        if not self.is_orthonormal:
            x_QR = torch.linalg.solve_triangular(self.triangle_QK, x_QR, upper=True)
        return self.tall @ x_QR


def decompose(factors: Sequence[Factors], basis: Sequence[int] | None = None) -> Decomposition:
    """Return the decomposition of one module's stack, from which every user's soup can be truncated.

    Args:
        factors: one per expert, of any ranks.
        basis: one number per expert, the same for experts with equal A's, whose rows are then stacked once. By default
            no experts share A.

    dtype and device: float64, on the factors' device. The float64 factors of a single expert may be referenced, not
    copied: they must not change while the decomposition is in use.

    Raises:
        ValueError: if there are no factors.
    """
    if not any(each.rank for each in factors):
        raise ValueError("there are no factors to decompose: give the factors of at least one expert")
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
    """Return the best approximation of one delta, as `Decomposition.truncate` does for one expert of weight 1."""
    check_cut(rank, energy)
    return decompose([factors]).truncate([1.0], rank, energy)


def check_cut(rank: int | None, energy: float | None) -> None:
    """Raise ValueError unless exactly one is given: a rank of at least 1, or an energy share in (0, 1]."""
    if (rank is None) == (energy is None):
        raise ValueError(f"give exactly one of rank and energy, not rank={rank} and energy={energy}")
    if rank is not None and rank <= 0:
        raise ValueError(f"the rank is {rank}; it must be positive")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy is {energy}; it must be above 0 and at most 1")


def least_rank(sums: Tensor, wanted: float) -> int:
    """Return the least number of squared singular values whose sum reaches `wanted`; len(sums) + 1 if none does.

    Args:
        sums: the cumulative sums of the squared singular values, the greatest first.
        wanted: an energy share times the energy.
    """
    return int(torch.searchsorted(sums, wanted)) + 1


def column_signs(b_OR: Tensor) -> Tensor:
    """Return for each column the sign (1 or -1) of its entry of the largest magnitude; 1 for a column of zeros."""
    largest = b_OR.abs().argmax(dim=0, keepdim=True)
    return torch.where(b_OR.gather(0, largest)[0] < 0, -1.0, 1.0).to(b_OR.dtype)


def _thin(parts: Sequence[Tensor]) -> _Thin:
    # float64, because a Gram matrix squares the condition number
    tall_NK = torch.cat([part.double() for part in parts], dim=1) if len(parts) > 1 else parts[0].double()
    triangle_KK = _cholesky(tall_NK)
    if triangle_KK is not None:
        return _Thin(tall_NK, triangle_KK, is_orthonormal=False)
    # Householder QR also works for matrices without full column rank, for which Cholesky fails: columns of zeros, the
    # same expert twice, more columns than rows
    orthonormal_NQ, triangle_QK = torch.linalg.qr(tall_NK)
    return _Thin(orthonormal_NQ, triangle_QK, is_orthonormal=True)


def _cholesky(tall_NK: Tensor) -> Tensor | None:
    """Return R of `T = Q R` from the Cholesky factor of T^T T, six times as fast as QR; None if T is ill conditioned.

    The columns are scaled to length 1 first. Scaling R back is exact up to rounding, and the condition number then
    depends on the angles between columns only, not on their lengths.
    """
    gram_KK = tall_NK.T @ tall_NK
    lengths = gram_KK.diagonal().sqrt()
    # `not x >= limit` instead of `x < limit`: NaN must take the slow path, and both comparisons are false for NaN
    if not float(gram_KK.diagonal().min()) >= MIN_SQUARE:
        return None
    lower, failed = torch.linalg.cholesky_ex(gram_KK / torch.outer(lengths, lengths))
    inverse = torch.linalg.solve_triangular(
        lower, torch.eye(len(lower), dtype=lower.dtype, device=lower.device), upper=False
    )
    # The condition number is at most the product of the Frobenius norms of the factor and of its inverse. The factor
    # has rows of length 1, so its norm is sqrt(K).
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
