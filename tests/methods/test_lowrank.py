from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import truncate


def random_factors(out: int, into: int, rank: int, seed: int = 0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    shape = {"generator": generator, "dtype": torch.float64}
    return Factors(torch.randn(rank, into, **shape), torch.randn(out, rank, **shape), 1.5)  # type: ignore[call-overload]


@settings(max_examples=60, deadline=None)
@given(
    out=st.integers(1, 9),
    into=st.integers(1, 9),
    rank=st.integers(1, 12),
    kept=st.integers(1, 14),
    seed=st.integers(0, 99),
)
def test_the_error_is_that_of_the_dense_svd(out: int, into: int, rank: int, kept: int, seed: int) -> None:
    factors = random_factors(out, into, rank, seed)
    dense = 1.5 * (factors.b_OR.numpy() @ factors.a_RI.numpy())
    values = np.linalg.svd(dense, compute_uv=False)
    best = np.sqrt((values[kept:] ** 2).sum())
    result = truncate(factors, kept)
    assert result.factors.rank == min(kept, rank)
    error = np.linalg.norm(dense - result.factors.b_OR.numpy() @ result.factors.a_RI.numpy())
    room = 1e-12 * np.linalg.norm(dense)
    assert abs(error - best) <= room
    assert result.relative_error == pytest.approx(best / np.linalg.norm(dense), abs=1e-7)


@pytest.mark.parametrize("kind", ["zero b", "doubled", "zero columns"])
def test_rank_deficient_stacks_are_survived(kind: str) -> None:
    part = random_factors(20, 30, 4)
    if kind == "zero b":
        factors, want = Factors(part.a_RI, torch.zeros_like(part.b_OR)), torch.zeros(20, 30, dtype=torch.float64)
    elif kind == "doubled":
        factors = Factors(torch.cat([part.a_RI] * 3), torch.cat([part.b_OR] * 3, dim=1))
        want = 3 * (part.b_OR @ part.a_RI)
    else:
        b = part.b_OR.clone()
        b[:, 1:] = 0
        factors, want = Factors(part.a_RI, b), b @ part.a_RI
    result = truncate(factors, 4)
    torch.testing.assert_close(result.factors.b_OR @ result.factors.a_RI, want, rtol=0, atol=1e-12)
    assert result.relative_error < 1e-12


@pytest.mark.parametrize("seed", range(5))
def test_signs_are_fixed_and_factors_balanced(seed: int) -> None:
    result = truncate(random_factors(20, 30, 4, seed), 3).factors
    largest = result.b_OR.abs().argmax(dim=0)
    assert (result.b_OR[largest, torch.arange(3)] > 0).all()
    torch.testing.assert_close(result.a_RI.norm(dim=1), result.b_OR.norm(dim=0))


def test_a_rank_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        truncate(random_factors(3, 3, 2), 0)
