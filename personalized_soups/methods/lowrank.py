"""The best low-rank approximation of a sum of low-rank deltas, without forming an O x I matrix.

A and B are the experts' stacked factors. With `B = Q_B R_B` and `A^T = Q_A R_A`, `B A = Q_B (R_B R_A^T) Q_A^T`. So the
product B A has the singular values of the K x K core `R_B R_A^T`. Only the core depends on the weights of a soup, so
one decomposition is enough for all users.

Shapes: O = out_features, I = in_features, R = rank of the approximation, K = sum of the experts' ranks, E = number of
experts, N = rows of a tall matrix, Q = columns of its orthonormal factor (at most K).
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
# same relative error (Ostrowski). The full product B A does not have this error, because T R^-1 R = T. Measured at the
# limit: an error of 3e-11 in the product at rank R, and of 6e-12 in the tail.
MAX_CONDITION = 1e4
# Squared lengths of columns below this value have lost digits: the smallest normal number of float64 is 2e-308.
MIN_SQUARE = 1e-280


@dataclass(frozen=True, eq=False, slots=True)
class Truncated:
    """A low-rank approximation of a delta, and its error.

    Attributes:
        factors: the factors of the approximation. Their rank is at most R.
        energy: the squared Frobenius norm of the whole delta.
        lost: the squared Frobenius norm of the delta minus the approximation.
    """

    factors: Factors
    energy: float
    lost: float

    @property
    def relative_error(self) -> float:
        """The Frobenius norm of the error divided by that of the whole delta. It is 0 if the delta is 0."""
        return float((self.lost / self.energy) ** 0.5) if self.energy > 0 else 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Decomposition:
    """The decomposition of all experts' factors of one module. It does not depend on the experts' weights.

    Attributes:
        left: the decomposition of the stacked B's.
        right: the decomposition of the distinct A's, transposed.
        expert_K: for each column of the stacked B's, the index of the expert that it belongs to.
        row_K: for each column of the stacked B's, the index of the row of the distinct A's that it multiplies.
        scalings: the experts' scalings.
    """

    left: _Thin
    right: _Thin
    expert_K: Tensor  # noqa: N815
    row_K: Tensor  # noqa: N815
    scalings: tuple[float, ...]

    def truncate(self, weights: Sequence[float], rank: int | None = None, energy: float | None = None) -> Truncated:
        """Return the best approximation (Eckart-Young) of `sum_e w_e s_e B_e A_e`, and its error.

        `w_e`, `s_e`, `B_e` and `A_e` are the weight, the scaling and the factors of expert e. If `U S V^T` is the
        singular value decomposition, the factors are `B = U sqrt(S)` and `A = sqrt(S) V^T`. Because both factors take
        the root of S, neither factor overflows or underflows 16 bits before the other. The signs are chosen so that the
        entry of the largest magnitude in each column of B is positive. If the singular values `S_R` and `S_(R+1)` are
        nearly equal, the factors are not unique, but the error is still unique.

        Args:
            weights: one per expert. A weight may be negative or 0.
            rank: the rank of the approximation.
            energy: the share of the sum of the squared singular values to keep, as an alternative to `rank`. The
                smallest rank that keeps this share is used.

        Returns:
            a_RI and b_OR with scaling 1, new tensors in float64 on the device of the factors. They are zeros if the
            delta is 0. If `rank` is given, their rank is the smaller of `rank` and the number of rows of the distinct
            A's. If the squared norm of the delta underflows in float64 (the norm is below 1e-154), `energy` and `lost`
            are 0.

        Raises:
            ValueError: if both or neither of rank and energy are given, if the value is out of bounds, if there is not
                one weight per expert, or if the delta or its squared norm is not finite.
        """
        check_cut(rank, energy)
        share = energy or 0.0
        products = [weight * scaling for weight, scaling in zip(weights, self.scalings, strict=True)]
        products_K = torch.tensor(products, dtype=torch.float64, device=self.expert_K.device)[self.expert_K]
        # a K x K matrix, the only part that depends on the weights
        core = (self.left.triangle_QK * products_K) @ self.right.triangle_QK[:, self.row_K].T
        if not all_finite(core):
            raise ValueError("the delta is not finite: it contains NaN or infinity")
        u, values, vh = torch.linalg.svd(core, full_matrices=False)
        squares = values.square()
        sums = squares.cumsum(0)
        total = float(sums[-1])
        # the squared norm of a delta whose norm is above 1e154 overflows float64
        if math.isinf(total):
            raise ValueError(f"the delta's norm is {float(values[0]):g} or more, and its square overflows float64")
        kept = min(rank or least_rank(sums, share * total), len(values))
        root = values[:kept].sqrt()
        b_OR = self.left.times(u[:, :kept] * root)
        # an SVD does not determine the signs, and versions of LAPACK differ; fixed signs make the files reproducible
        signs = column_signs(b_OR)
        a_RI = self.right.times(vh[:kept].T * (root * signs)).T.contiguous()
        # If O or I is less than K, there are fewer than K singular values. Zeros fill the factors up to the given rank.
        missing = min(rank or 0, self.right.triangle_QK.shape[1]) - kept
        factors = Factors(_padded(a_RI, missing, 0), _padded(b_OR.mul_(signs), missing, 1))
        return Truncated(factors, total, float(squares[kept:].sum()))


@dataclass(frozen=True, eq=False, slots=True)
class _Thin:
    """The decomposition `T = Q R` of a tall matrix T. Q is orthonormal.

    Attributes:
        tall: Q if `is_orthonormal` is set, else T. T is stored if R is well conditioned, because `T (R^-1 x)` then
            costs less than forming Q.
        triangle_QK: R, an upper triangular matrix.
        is_orthonormal: whether `tall` is Q.
    """

    tall: Tensor
    triangle_QK: Tensor  # noqa: N815
    is_orthonormal: bool

    def times(self, x_QR: Tensor) -> Tensor:
        """Return the product of Q and `x_QR` as a new tensor."""
        if not self.is_orthonormal:
            x_QR = torch.linalg.solve_triangular(self.triangle_QK, x_QR, upper=True)
        return self.tall @ x_QR


def decompose(factors: Sequence[Factors], basis: Sequence[int] | None = None) -> Decomposition:
    """Decompose the stacked factors of one module, so that the soup of any weights can be truncated.

    The decomposition is in float64 on the device of the factors. It may refer to the float64 factors of a single expert
    instead of copying them, so do not change the factors while you use the decomposition.

    Args:
        factors: one per expert. The ranks may differ.
        basis: one number per expert. Experts with equal numbers must have equal A's, whose rows are stacked once. By
            default, no experts share A.

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
    """Check that exactly one of `rank` and `energy` is given, and that its value is allowed.

    Raises:
        ValueError: if both or neither are given, if `rank` is below 1, or if `energy` is not above 0 and at most 1.
    """
    if (rank is None) == (energy is None):
        raise ValueError(f"give exactly one of rank and energy, not rank={rank} and energy={energy}")
    if rank is not None and rank <= 0:
        raise ValueError(f"the rank is {rank}; it must be positive")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy is {energy}; it must be above 0 and at most 1")


def least_rank(sums: Tensor, wanted: float) -> int:
    """Return the smallest number of squared singular values whose sum is at least `wanted`.

    If all of them together are less than `wanted`, return `len(sums) + 1`.

    Args:
        sums: the cumulative sums of the squared singular values, in descending order of the singular values.
        wanted: an energy share times the energy of the delta.
    """
    return int(torch.searchsorted(sums, wanted)) + 1


def column_signs(b_OR: Tensor) -> Tensor:
    """Return the sign (1 or -1) of the entry of the largest magnitude in each column.

    The sign of a column of zeros is 1.
    """
    largest = b_OR.abs().argmax(dim=0, keepdim=True)
    return torch.where(b_OR.gather(0, largest)[0] < 0, -1.0, 1.0).to(b_OR.dtype)


def _thin(parts: Sequence[Tensor]) -> _Thin:
    # in float64, because the condition number of a Gram matrix is the square of that of T
    tall_NK = torch.cat([part.double() for part in parts], dim=1) if len(parts) > 1 else parts[0].double()
    triangle_KK = _cholesky(tall_NK)
    if triangle_KK is not None:
        return _Thin(tall_NK, triangle_KK, is_orthonormal=False)
    # Cholesky fails for matrices without full column rank, for example if they have columns of zeros, the same expert
    # twice, or more columns than rows. Householder QR also works for such matrices.
    orthonormal_NQ, triangle_QK = torch.linalg.qr(tall_NK)
    return _Thin(orthonormal_NQ, triangle_QK, is_orthonormal=True)


def _cholesky(tall_NK: Tensor) -> Tensor | None:
    """Return R of `T = Q R` from the Cholesky factor of T^T T. Return None if T is ill conditioned.

    This is six times as fast as QR. The columns of T are scaled to length 1 first, and R is scaled back, which adds
    only rounding errors. So the condition number depends only on the angles between the columns, not on their lengths.
    """
    gram_KK = tall_NK.T @ tall_NK
    lengths = gram_KK.diagonal().sqrt()
    # `not x >= limit` instead of `x < limit`: both comparisons are false for NaN, and NaN must take the slow path
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
