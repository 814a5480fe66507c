"""How experts' low-rank deltas lie to one another: inner products, subspaces, signs; no O x I matrix but some rows.

With `d_e = s_e B_e A_e`, `<d_i, d_j> = s_i s_j sum_kl (B_i^T B_j)_kl (A_i A_j^T)_kl`: all that is needed are the small
Gram matrices. E experts, K sum of ranks, R rank of one, O out features, I in features, N rows that are looked at.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from personalized_soups.methods.blocks import row_blocks
from personalized_soups.methods.factors import Factors

# Squared singular values below this share of the greatest are those of rounding: a Gram matrix in float64 knows no
# singular value of less than 1e-6 of the greatest to any digit that counts.
_SMALLEST_SQUARE = 1e-12


def inner_products(factors: Sequence[Factors]) -> Tensor:
    """Return `<d_i, d_j>` of every two deltas, their scalings included: float64 `[E, E]` on the CPU."""
    ranks = [each.rank for each in factors]
    a_KI = torch.cat([each.a_RI.double() for each in factors])
    b_OK = torch.cat([each.b_OR.double() * each.scaling for each in factors], dim=1)
    products_KK = (b_OK.T @ b_OK) * (a_KI @ a_KI.T)
    sums = [[part.sum() for part in row.split(ranks, dim=1)] for row in products_KK.split(ranks)]
    return torch.stack([torch.stack(row) for row in sums]).cpu()


def row_overlaps(matrices_RN: Sequence[Tensor]) -> Tensor:
    """Return how far the spaces that the rows of every two matrices span are one: float64 `[E, E]` on the CPU.

    It is the mean of the squared cosines of their principal angles (as many as the smaller space has dimensions): 1
    where one holds the other, 0 where they are orthogonal, and the larger one's share of all dimensions for random
    spaces. NaN where a matrix is 0 and spans nothing.
    """
    ranks = [matrix.shape[0] for matrix in matrices_RN]
    stack_KN = torch.cat([matrix.double() for matrix in matrices_RN])
    grams = [row.split(ranks, dim=1) for row in (stack_KN @ stack_KN.T).split(ranks)]
    bases = [_orthonormalizing(grams[index][index]) for index in range(len(ranks))]
    found = torch.full((len(ranks), len(ranks)), torch.nan, dtype=torch.float64)
    for i, one in enumerate(bases):
        for j, other in enumerate(bases):
            least = min(one.shape[1], other.shape[1])
            if least:
                # the singular values of this core are the cosines of the principal angles (Bjorck, Golub 1973)
                core = one.T @ grams[i][j] @ other
                found[i, j] = min(float(core.square().sum()) / least, 1.0)
    return found


def opposed_energies(factors: Sequence[Factors], rows_N: Tensor) -> tuple[Tensor, Tensor]:
    """Return where deltas have opposite signs, in some rows of them.

    Args:
        factors: one per expert.
        rows_N: the rows to look at; each N x I block of the deltas is formed a few rows at a time.

    Returns:
        opposed_EE: `opposed[i, j]` is the sum of the squares of `d_i` in those entries where `d_j` has the other sign.
        energy_E: the sum of the squares of `d_i`. Both in float64 on the CPU.
    """
    count = len(factors)
    opposed_EE = torch.zeros(count, count, dtype=torch.float64)
    energy_E = torch.zeros(count, dtype=torch.float64)
    wide = [(each.b_OR[rows_N].double() * each.scaling, each.a_RI.double()) for each in factors]
    for block in row_blocks(factors[0].a_RI[:1].expand(len(rows_N), -1)):
        deltas = [b_NR[block] @ a_RI for b_NR, a_RI in wide]
        squares = [delta.square() for delta in deltas]
        for i, one in enumerate(deltas):
            energy_E[i] += squares[i].sum().cpu()
            for j in range(i):
                differ = one.sign() * deltas[j].sign() < 0
                opposed_EE[i, j] += squares[i][differ].sum().cpu()
                opposed_EE[j, i] += squares[j][differ].sum().cpu()
    return opposed_EE, energy_E


def _orthonormalizing(gram_RR: Tensor) -> Tensor:
    """Return W with `W^T G W = 1`: of as many columns as the rows behind the Gram matrix have dimensions."""
    values, vectors = torch.linalg.eigh(gram_RR)
    kept = values > _SMALLEST_SQUARE * values[-1].clamp(min=0)
    scaled: Tensor = vectors[:, kept] / values[kept].sqrt()
    return scaled
