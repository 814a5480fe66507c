"""The best low-rank approximation of a dense delta, nearly: a randomised range finder.

Halko, Martinsson, Tropp: Finding Structure with Randomness (SIAM Review 53, 2011; arXiv 0909.4061), algorithms 4.4 and
5.1. The delta is multiplied with a few random columns, which find the space of its greatest singular values; it is
decomposed within that space.

O out features, I in features, R rank that is kept, L columns of the sketch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import Truncated, check_cut, column_signs, least_rank
from personalized_soups.methods.streams import Stream

# Each iteration takes two more passes over the delta. Measured on what ties and dare make of three experts (density 0.2
# to 0.5, 2048 x 1024, kept 16 to 64): the error is up to 28% above the best one without any, 0.8% after one, 0.4% after
# two; on a Gaussian matrix 3.3%, 1.6%, 0.9%.
POWER_ITERATIONS = 2
# The rank that an energy share is first looked for within.
FIRST_RANK = 32
# Elements that are converted to float64 at a time: 2 MiB, which stay in the cache.
BLOCK = 2**18
# A tail that is a smaller share of the delta's energy is not what is left by subtraction, whose rounding (about 1e-15
# of the energy) would show in it.
CANCELLED = 1e-10


def approximate(delta_OI: Tensor, *, rank: int | None = None, energy: float | None = None, stream: Stream) -> Truncated:
    """Return an approximation of a dense delta at `rank`, or at the least rank found to keep the share `energy`.

    With P = R // 2 + 16 columns more than the rank, the squared error exceeds the best one (Eckart-Young) by at most
    the factor 1 + R / (P - 1) < 3 in the mean over streams (theorem 10.5), and by far less after power iterations where
    the singular values fall; the error that is returned is that of the result itself. Where the sketch would be wider
    than half the delta, and where an energy share needs that, the singular value decomposition is taken instead.

    Args:
        delta_OI: on any device; float64 is computed in float64; of lower precision, the power iterations are done in
            float32, and all else in float64. Not changed.
        rank: the rank to keep; or
        energy: the share of the squared singular values to keep, in (0, 1].
        stream: the test matrix is drawn from it; the same stream gives the same result.

    Returns:
        a_RI and b_OR with scaling 1, new tensors in float64 and on the delta's device, as in Decomposition.truncate;
        zeros where the delta is 0. The rank is `rank` or that of a full matrix, whichever is less.

    Raises:
        ValueError: if not exactly one of rank and energy is given, either is out of bounds, or the delta or its squared
            norm is not finite.
    """
    check_cut(rank, energy)
    delta_OI = delta_OI.to(torch.promote_types(delta_OI.dtype, torch.float32))
    total = sum(float(block.square().sum()) for _, block in _blocks(delta_OI))
    if not math.isfinite(total):
        raise ValueError("the delta or its squared norm is not finite")
    side = min(delta_OI.shape)
    share = energy or 0.0
    candidate = rank or FIRST_RANK
    while 2 * (width := candidate + candidate // 2 + 16) <= side:
        range_OL, u, values, vh = _sketched(delta_OI, width, stream)
        # of the values beyond the candidate a sketch has too little
        sums = values[:candidate].square().cumsum(0)
        kept = rank or least_rank(sums, share * total)
        if kept <= candidate:
            return _truncated(delta_OI, range_OL @ u[:, :kept], values[:kept], vh[:kept], total)
        # no value to come is greater than the last one: so many more are needed at least
        missing, last = share * total - float(sums[-1]), float(values[candidate - 1]) ** 2
        if missing >= side * last:
            break
        candidate = max(2 * candidate, candidate + math.ceil(missing / last))
    u, values, vh = torch.linalg.svd(delta_OI.double(), full_matrices=False)
    sums = values.square().cumsum(0)
    kept = rank or least_rank(sums, share * float(sums[-1]))
    return _truncated(delta_OI, u[:, :kept], values[:kept], vh[:kept], total)


def _sketched(delta_OI: Tensor, width: int, stream: Stream) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return an orthonormal range_OL and the singular value decomposition of `range^T delta`, all float64."""
    uniform_IL = stream.uniform((delta_OI.shape[1], width), delta_OI.device).double()
    # the inverse of the normal distribution function, at the middle of each step of 2^-24; the scale does not matter
    right_IL = _orthonormal(torch.erfinv(2 * uniform_IL - (1 - 2.0**-24)).to(delta_OI.dtype))
    for _ in range(POWER_ITERATIONS):
        # made orthonormal after each product, else all columns turn to the greatest singular vector
        right_IL = _orthonormal(delta_OI.T @ _orthonormal(delta_OI @ right_IL))
    # in float64, as the space is not better than this product: a delta of low rank comes out to its own rounding
    right_IL = right_IL.double()
    range_OL = _orthonormal(torch.cat([block @ right_IL for _, block in _blocks(delta_OI)]))
    within_LI = range_OL.new_zeros(width, delta_OI.shape[1])
    for rows, block in _blocks(delta_OI):
        within_LI.addmm_(range_OL[rows].T, block)
    return range_OL, *torch.linalg.svd(within_LI, full_matrices=False)


def _truncated(delta_OI: Tensor, left_OR: Tensor, values_R: Tensor, right_RI: Tensor, total: float) -> Truncated:
    """Return balanced factors of the projection of the delta, whose error is what its energy lacks (Pythagoras)."""
    root_R = values_R.sqrt()
    signs_R = column_signs(left_OR)
    factors = Factors((root_R * signs_R)[:, None] * right_RI, left_OR * (root_R * signs_R))
    lost = total - float(values_R.square().sum())
    if lost < CANCELLED * total:
        tails = (torch.addmm(block, factors.b_OR[rows], factors.a_RI, alpha=-1) for rows, block in _blocks(delta_OI))
        lost = sum(float(tail.square().sum()) for tail in tails)
    return Truncated(factors, total, lost)


def _orthonormal(columns: Tensor) -> Tensor:
    orthonormal: Tensor = torch.linalg.qr(columns)[0]
    return orthonormal


def _blocks(delta_OI: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the delta in float64, some rows at a time, and which."""
    step = max(1, BLOCK // delta_OI.shape[1])
    for start in range(0, delta_OI.shape[0], step):
        rows = slice(start, start + step)
        yield rows, delta_OI[rows].double()
