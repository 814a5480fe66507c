"""The similarity of experts' low-rank deltas: inner products, subspaces and signs, without forming O x I matrices.

With `d_e = s_e B_e A_e` for expert e, `<d_i, d_j> = s_i s_j sum_kl (B_i^T B_j)_kl (A_i A_j^T)_kl`. So only Gram
matrices of size K x K are needed.

Shapes: E = number of experts, K = sum of the experts' ranks, R = rank of one expert, O = out_features, I = in_features,
N = number of sampled rows (in `row_overlaps`: number of columns).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from personalized_soups.methods.blocks import row_blocks
from personalized_soups.methods.factors import Factors

# Eigenvalues of a Gram matrix below this share of the largest eigenvalue are rounding errors. Forming the Gram matrix
# squares the singular values, so in float64 singular values below about 1e-6 of the largest one are lost.
_SMALLEST_SQUARE = 1e-12


def inner_products(factors: Sequence[Factors]) -> Tensor:
    """Return the inner products of every two deltas, including the scalings, as float64 `[E, E]` on the CPU."""
    ranks = [each.rank for each in factors]
    a_KI = torch.cat([each.a_RI.double() for each in factors])
    b_OK = torch.cat([each.b_OR.double() * each.scaling for each in factors], dim=1)
    # <B_i A_i, B_j A_j> = trace(A_i^T B_i^T B_j A_j), the sum of the block (i, j) of this elementwise product
    products_KK = (b_OK.T @ b_OK) * (a_KI @ a_KI.T)
    sums = [[part.sum() for part in row.split(ranks, dim=1)] for row in products_KK.split(ranks)]
    return torch.stack([torch.stack(row) for row in sums]).cpu()


def row_overlaps(matrices_RN: Sequence[Tensor]) -> Tensor:
    """Return the overlaps of the row spaces of every two matrices, as float64 `[E, E]` on the CPU.

    The overlap of two spaces is the mean squared cosine of their principal angles. There are as many angles as the
    smaller space has dimensions. The overlap is 1 if one space contains the other, and 0 if the spaces are orthogonal.
    For two random spaces, its expected value is the dimension of the larger space divided by N. The overlap is NaN if
    one of the matrices is 0.
    """
    ranks = [matrix.shape[0] for matrix in matrices_RN]
    stack_KN = torch.cat([matrix.double() for matrix in matrices_RN])
    grams = [row.split(ranks, dim=1) for row in (stack_KN @ stack_KN.T).split(ranks)]
    bases = [_orthonormalizing(grams[index][index]) for index in range(len(ranks))]
    overlaps_EE = torch.full((len(ranks), len(ranks)), torch.nan, dtype=torch.float64)
    for i, left in enumerate(bases):
        for j, right in enumerate(bases):
            num_angles = min(left.shape[1], right.shape[1])
            if num_angles:
                # the singular values of this core are the cosines of the principal angles (Bjorck, Golub 1973)
                core = left.T @ grams[i][j] @ right
                # the rounded quotient may exceed 1 by an ulp
                overlaps_EE[i, j] = min(float(core.square().sum()) / num_angles, 1.0)
    return overlaps_EE


def opposed_energies(factors: Sequence[Factors], rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return how much of each delta has the opposite sign of each other delta, in a sample of rows.

    Args:
        factors: one per expert.
        rows_N: the indices of the sampled rows. Only a few of these rows of the deltas are in memory at a time.

    Returns:
        opposed_EE: `opposed[i, j]` is the sum of the squares of the entries of `d_i` whose sign is opposite in `d_j`.
        energy_E: `energy[i]` is the sum of the squares of the entries of `d_i`.

        Both are float64 on the CPU.
    """
    count = len(factors)
    opposed_EE = torch.zeros(count, count, dtype=torch.float64)
    energy_E = torch.zeros(count, dtype=torch.float64)
    # select the rows of B before converting to float64, so that the copy is N x R instead of O x R
    wide = [(each.b_OR[rows_N].double() * each.scaling, each.a_RI.double()) for each in factors]
    for block in row_blocks(factors[0].a_RI[:1].expand(len(rows_N), -1)):
        deltas = [b_NR[block] @ a_RI for b_NR, a_RI in wide]
        squares = [delta.square() for delta in deltas]
        for i, delta in enumerate(deltas):
            energy_E[i] += squares[i].sum().cpu()
            for j in range(i):
                # multiply signs instead of entries, because a product of two small entries could underflow to 0
                differ = delta.sign() * deltas[j].sign() < 0
                opposed_EE[i, j] += squares[i][differ].sum().cpu()
                opposed_EE[j, i] += squares[j][differ].sum().cpu()
    return opposed_EE, energy_E


def _orthonormalizing(gram_RR: Tensor) -> Tensor:
    """Return a matrix W with `W^T G W = 1`, where G is a Gram matrix.

    W has one column per dimension of the row space of the matrix that G belongs to.
    """
    values, vectors = torch.linalg.eigh(gram_RR)
    kept = values > _SMALLEST_SQUARE * values[-1].clamp(min=0)
    scaled: Tensor = vectors[:, kept] / values[kept].sqrt()
    return scaled
