from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.knots import knots

Matrix = NDArray[np.float64]


def expert(seed: int, rank: int, *, scaling: float = 2.0, shape: tuple[int, int] = (24, 31)) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(rank, shape[1], generator=generator, dtype=torch.float64)
    return Factors(a, torch.randn(shape[0], rank, generator=generator, dtype=torch.float64), scaling)


def dense_knots(deltas: list[Matrix], weights: list[float], density: float, lambda_: float) -> Matrix:
    """The paper's way: one SVD of the O x (E I) matrix, TIES on S V_e entry by entry, and back."""
    u, s, v = np.linalg.svd(np.concatenate(deltas, axis=1), full_matrices=False)
    live = s > 1e-9 * s[0]
    u, sv = u[:, live], (s[:, None] * v)[live]
    parts = []
    for part in np.split(sv, len(deltas), axis=1):
        k = int(density * part.size)
        least = np.sort(np.abs(part).ravel())[::-1][k - 1]
        parts.append(np.where(np.abs(part) >= least, part, 0))
    merged = np.zeros_like(parts[0])
    for index in np.ndindex(merged.shape):
        values = [w * part[index] for w, part in zip(weights, parts, strict=True)]
        sign = 1 if sum(values) >= 0 else -1
        agree = [e for e, value in enumerate(values) if np.sign(value) == sign]
        if agree:
            merged[index] = sum(values[e] for e in agree) / sum(abs(weights[e]) for e in agree)
    return lambda_ * (u @ merged)


@pytest.mark.parametrize("density", [0.2, 0.6, 1.0])
@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.6, 0.3, -0.2]])
@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 5, 2), (8, 9, 10)])
def test_against_the_dense_decomposition(ranks: tuple[int, ...], weights: list[float], density: float) -> None:
    # (8, 9, 10): the ranks add up to more than O, so the basis is all of it
    experts = [expert(seed, rank) for seed, rank in enumerate(ranks)]
    got = knots(experts, weights, density=density, lambda_=1.5)
    assert got.rank == min(24, sum(ranks))
    want = dense_knots([each.delta().numpy() for each in experts], weights, density, 1.5)
    # both decompositions are backward stable: some n eps of the norm, over the gaps of these singular values (> 1%)
    assert np.linalg.norm(got.delta().numpy() - want) < 1e-10 * np.linalg.norm(want)


def test_directions_that_nobody_has_take_no_share_of_the_density() -> None:
    """Two experts of one B: the stack has rank 3, not 6, and is trimmed as such."""
    one, other = expert(0, 3), expert(1, 3)
    twin = Factors(other.a_RI, one.b_OR, one.scaling)
    got = knots([one, twin], [0.75, 0.25], density=0.5, lambda_=1.0)
    want = dense_knots([one.delta().numpy(), twin.delta().numpy()], [0.75, 0.25], 0.5, 1.0)
    assert got.rank == 6
    assert int((got.b_OR.norm(dim=0) > 0).sum()) == 3
    assert np.linalg.norm(got.delta().numpy() - want) < 1e-10 * np.linalg.norm(want)


def test_experts_that_share_their_outputs_directions_at_density_1_are_averaged() -> None:
    one = expert(0, 4)
    got = knots([one, one], [0.3, 0.9], density=1.0, lambda_=1.0)
    torch.testing.assert_close(got.delta(), one.delta(), rtol=0, atol=1e-11)


def test_zeros_and_more_ranks_than_features() -> None:
    zero = Factors(torch.ones(3, 5), torch.zeros(4, 3))
    got = knots([zero, zero], [1.0, 1.0], density=0.5, lambda_=1.0)
    assert (got.a_RI.shape, got.b_OR.shape) == ((4, 5), (4, 4))
    assert not got.delta().any()
    wide = expert(0, 6, shape=(3, 2))
    got = knots([wide], [1.0], density=1.0, lambda_=1.0)
    assert got.rank == 2
    torch.testing.assert_close(got.delta(), wide.delta(), rtol=0, atol=1e-12)


def test_the_factors_are_balanced_and_in_their_own_dtypes() -> None:
    parts = [Factors(each.a_RI.half(), each.b_OR.float(), 2.0) for each in (expert(0, 3), expert(1, 3))]
    got = knots(parts, [1.0, 1.0], density=1.0, lambda_=1.0)
    assert (got.a_RI.dtype, got.b_OR.dtype, got.scaling) == (torch.float16, torch.float32, 1.0)
    # b's columns have the norm sqrt(S); a's rows S times a mean of V's parts, over sqrt(S)
    assert 0.1 < float(got.a_RI.float().norm() / got.b_OR.norm()) < 10


def test_no_dense_delta_is_formed() -> None:
    """One delta of this size would take 36 GB in float32."""
    experts = [expert(seed, 1, shape=(95_000, 95_000)) for seed in range(2)]
    got = knots(experts, [1.0, 0.5], density=0.1, lambda_=1.0)
    assert (got.a_RI.shape, got.b_OR.shape) == ((2, 95_000), (95_000, 2))
    # each keeps k of the 2 x 95 000 entries in the common basis; what either keeps has somebody who agrees
    k = int(0.1 * 190_000)
    assert k <= int((got.a_RI != 0).sum()) <= 2 * k


def test_no_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="no factors for knots"):
        knots([], [], density=0.5, lambda_=1.0)
