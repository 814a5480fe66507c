"""A nearly best low-rank approximation of a dense delta, computed by a randomized range finder.

See Halko, Martinsson, Tropp: Finding Structure with Randomness (SIAM Review 53, 2011; arXiv 0909.4061), algorithms 4.4
and 5.1. The sketch is the product of the delta and a few random columns. It nearly spans the space of the largest
singular values. The singular value decomposition is then computed within that space.

Shapes: O = out_features, I = in_features, R = rank of the approximation, L = columns of the sketch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import Truncated, check_cut, column_signs, least_rank
from personalized_soups.methods.streams import Stream

# Each iteration costs two more passes over the delta. Measured on results of ties and dare for three experts (density
# 0.2 to 0.5, 2048 x 1024, rank 16 to 64): the error exceeds the smallest possible error by up to 28% without
# iterations, 0.8% after one iteration, and 0.4% after two. For a Gaussian matrix: 3.3%, 1.6% and 0.9%.
POWER_ITERATIONS = 2
# The rank of the first attempt if an energy share is given.
FIRST_RANK = 32
# The number of elements that are converted to float64 at a time. They take 2 MiB, which fit into the cache.
BLOCK = 2**18
# The error is the total energy minus the kept energy, with a rounding error of about 1e-15 of the total. If the
# difference is a smaller share of the total than this, the error is computed from the remaining delta instead.
CANCELLED = 1e-10


def approximate(delta_OI: Tensor, *, rank: int | None = None, energy: float | None = None, stream: Stream) -> Truncated:
    """Return a low-rank approximation of a dense delta, and its error.

    The sketch has P = R // 2 + 16 more columns than the rank R. In the mean over random streams, the squared error is
    at most 1 + R / (P - 1) < 3 times that of the best approximation (Eckart-Young; theorem 10.5). If the singular
    values fall, the power iterations make the error much smaller. The returned error is the error of the result, not a
    bound. If the sketch would have more than half as many columns as the smaller side of the delta, the exact singular
    value decomposition is computed instead.

    Args:
        delta_OI: the delta, on any device. It is not changed. A float64 delta is computed in float64. For other dtypes
            the power iterations run in float32, and everything else in float64.
        rank: the rank of the approximation.
        energy: the share of the sum of the squared singular values to keep, in (0, 1], as an alternative to `rank`. The
            smallest rank that is found to keep this share is used.
        stream: the source of the random matrix. The same stream gives the same result.

    Returns:
        a_RI and b_OR with scaling 1, new tensors in float64 on the device of the delta, with the signs of
        `Decomposition.truncate`. They are zeros if the delta is 0. If `rank` is given, their rank is the smallest of
        `rank`, O and I.

    Raises:
        ValueError: if both or neither of rank and energy are given, if the value is out of bounds, or if the delta or
            its squared norm is not finite.
    """
    check_cut(rank, energy)
    # torch has no QR or SVD of 16-bit floats
    delta_OI = delta_OI.to(torch.promote_types(delta_OI.dtype, torch.float32))
    # in float64, because the error is the difference of two energies
    total = sum(float(block.square().sum()) for _, block in _blocks(delta_OI))
    if not math.isfinite(total):
        raise ValueError("the delta is not finite, or its squared norm overflows float64")
    side = min(delta_OI.shape)
    share = energy or 0.0
    candidate = rank or FIRST_RANK
    while 2 * (width := candidate + candidate // 2 + 16) <= side:
        range_OL, u, values, vh = _sketched(delta_OI, width, stream)
        # a sketch underestimates the singular values in its extra columns, so only `candidate` of them count
        sums = values[:candidate].square().cumsum(0)
        kept = rank or least_rank(sums, share * total)
        if kept <= candidate:
            return _truncated(delta_OI, range_OL @ u[:, :kept], values[:kept], vh[:kept], total)
        # The singular values fall, so each further value adds at most the square of the last one. This bound gives the
        # smallest number of further values that can reach the share. If even all further values cannot reach the share,
        # the exact decomposition is needed.
        missing, last = share * total - float(sums[-1]), float(values[candidate - 1]) ** 2
        if missing >= side * last:
            break
        candidate = max(2 * candidate, candidate + math.ceil(missing / last))
    # a wider sketch would cost more than the exact decomposition
    u, values, vh = torch.linalg.svd(delta_OI.double(), full_matrices=False)
    sums = values.square().cumsum(0)
    kept = rank or least_rank(sums, share * float(sums[-1]))
    return _truncated(delta_OI, u[:, :kept], values[:kept], vh[:kept], total)


def _sketched(delta_OI: Tensor, width: int, stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an orthonormal range_OL, and the singular value decomposition of `range_OL^T delta_OI`, in float64."""
    uniform_IL = stream.uniform((delta_OI.shape[1], width), delta_OI.device).double()
    # Gaussian columns: erfinv inverts the normal distribution up to a scale, which does not change the space. The
    # uniform numbers are multiples of 2^-24; the middle of each step keeps erfinv's argument within (-1, 1).
    right_IL = _orthonormal(torch.erfinv(2 * uniform_IL - (1 - 2.0**-24)).to(delta_OI.dtype))
    for _ in range(POWER_ITERATIONS):
        # without orthonormalization after each product, all columns would converge to the first singular vector
        right_IL = _orthonormal(delta_OI.T @ _orthonormal(delta_OI @ right_IL))
    # The last product is in float64, because its rounding limits the accuracy of the space. A delta of low rank is then
    # recovered up to its own rounding.
    right_IL = right_IL.double()
    range_OL = _orthonormal(torch.cat([block @ right_IL for _, block in _blocks(delta_OI)]))
    # accumulated block by block, so that the whole delta is never in memory in float64
    within_LI = range_OL.new_zeros(width, delta_OI.shape[1])
    for rows, block in _blocks(delta_OI):
        within_LI.addmm_(range_OL[rows].T, block)
    return range_OL, *torch.linalg.svd(within_LI, full_matrices=False)


def _truncated(delta_OI: Tensor, left_OR: Tensor, values_R: Tensor, right_RI: Tensor, total: float) -> Truncated:
    """Return the factors of the projected delta, and the error.

    Each factor is multiplied by the roots of the singular values.
    """
    root_R = values_R.sqrt()
    signs_R = column_signs(left_OR)
    factors = Factors((root_R * signs_R)[:, None] * right_RI, left_OR * (root_R * signs_R))
    # the projection is orthogonal, so the squared norms of the result and the error add up to that of the delta
    lost = total - float(values_R.square().sum())
    if lost < CANCELLED * total:
        tails = (torch.addmm(block, factors.b_OR[rows], factors.a_RI, alpha=-1) for rows, block in _blocks(delta_OI))
        lost = sum(float(tail.square().sum()) for tail in tails)
    return Truncated(factors, total, lost)


def _orthonormal(columns: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(columns)[0]
    return orthonormal


def _blocks(delta_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of rows, each with the rows of the delta that it selects, in float64."""
    step = max(1, BLOCK // delta_OI.shape[1])
    for start in range(0, delta_OI.shape[0], step):
        rows = slice(start, start + step)
        yield rows, delta_OI[rows].double()
