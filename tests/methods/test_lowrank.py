"""Truncation against NumPy's singular value decomposition of the dense delta in float64.

Errors are compared, not factors: where singular values tie, the factors are not unique.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.lowrank import MAX_CONDITION, Truncated, decompose, truncate

Matrix = NDArray[np.float64]
ROUNDOFF = 2.0**-53
# Householder QR and the SVD are backward stable: each leaves an error of a few K unit roundoffs of what was summed.
STABLE = 1e-13
# What Cholesky adds at the limit of its guard, in shares of the delta: the departure of T R^-1 from orthonormal columns
# is below about K u MAX_CONDITION^2, with K at most 48 here; two such matrices enter.
GUARDED = 2 * 48 * ROUNDOFF * MAX_CONDITION**2


@dataclass(frozen=True)
class Stack:
    """One module of some experts, and how to weigh them."""

    factors: list[Factors]
    weights: list[float]
    basis: list[int] | None = None

    @property
    def delta(self) -> Matrix:
        """The dense sum."""
        parts = [
            weight * each.scaling * (numpy(each.b_OR) @ numpy(each.a_RI))
            for weight, each in zip(self.weights, self.factors, strict=True)
        ]
        return np.asarray(sum(parts[1:], parts[0]))

    @property
    def size(self) -> float:
        """What rounding is measured by: the norms of what is added up, however much of it cancels."""
        return math.fsum(
            abs(weight * each.scaling) * float(np.linalg.norm(numpy(each.b_OR)) * np.linalg.norm(numpy(each.a_RI)))
            for weight, each in zip(self.weights, self.factors, strict=True)
        )

    @property
    def rank(self) -> int:
        """K: the sum of the ranks of the distinct A's."""
        numbers = range(len(self.factors)) if self.basis is None else self.basis
        return sum({number: each.rank for number, each in zip(numbers, self.factors, strict=True)}.values())


def numpy(tensor: torch.Tensor) -> Matrix:
    return tensor.double().numpy()


def dense(result: Truncated) -> Matrix:
    assert result.factors.scaling == 1
    assert result.factors.a_RI.dtype == result.factors.b_OR.dtype == torch.float64
    return numpy(result.factors.b_OR) @ numpy(result.factors.a_RI)


def random_factors(out: int, into: int, rank: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a_RI = torch.randn(rank, into, generator=generator, dtype=torch.float64)
    return Factors(a_RI.to(dtype), torch.randn(out, rank, generator=generator, dtype=torch.float64).to(dtype), 1.5)


KINDS = ("free", "doubled", "shared", "zero b", "zero columns", "nearly equal", "far apart", "float32")


@st.composite
def stacks(draw: st.DrawFn) -> Stack:
    out, into, count = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    ranks = draw(st.lists(st.integers(1, 12), min_size=count, max_size=count))
    seed, kind = draw(st.integers(0, 999)), draw(st.sampled_from(KINDS))
    dtype = torch.float32 if kind == "float32" else torch.float64
    factors = [random_factors(out, into, rank, seed + 1000 * i, dtype) for i, rank in enumerate(ranks)]
    basis = None
    if kind == "doubled":
        factors = [factors[0]] * count
    elif kind == "shared":
        basis = draw(st.lists(st.integers(0, 1), min_size=count, max_size=count))
        firsts = [factors[basis.index(number)] for number in basis]
        shapes = [random_factors(out, into, first.rank, seed + i) for i, first in enumerate(firsts)]
        factors = [Factors(f.a_RI, s.b_OR, i + 0.5) for i, (f, s) in enumerate(zip(firsts, shapes, strict=True))]
    elif kind == "zero b":
        factors[0] = Factors(factors[0].a_RI, torch.zeros_like(factors[0].b_OR))
    elif kind == "zero columns":
        factors[-1].b_OR[:, 1:] = 0
    elif kind == "nearly equal":
        apart = 10.0 ** -draw(st.integers(1, 12))
        factors = [
            Factors(factors[0].a_RI + apart * random_factors(out, into, ranks[0], i).a_RI, factors[0].b_OR)
            for i in range(count)
        ]
    elif kind == "far apart":
        factors = [Factors(each.a_RI * 1e30, each.b_OR * 10.0 ** (-30 * i)) for i, each in enumerate(factors)]
    weight = st.sampled_from([0.0, 1.0, -1.0, 0.3, -2.5, 1e-3])
    return Stack(factors, draw(st.lists(weight, min_size=count, max_size=count)), basis)


@settings(max_examples=300, deadline=None)
@given(stack=stacks(), rank=st.integers(1, 50))
def test_the_error_at_a_rank_is_that_of_the_dense_svd(stack: Stack, rank: int) -> None:
    result = decompose(stack.factors, stack.basis).truncate(stack.weights, rank)
    delta = stack.delta
    values = np.linalg.svd(delta, compute_uv=False)
    room = GUARDED * np.linalg.norm(delta) + STABLE * stack.size
    assert result.factors.rank == min(rank, stack.rank)
    best = np.linalg.norm(values[rank:])
    assert abs(np.linalg.norm(delta - dense(result)) - best) <= room
    assert abs(math.sqrt(result.lost) - best) <= room
    assert abs(math.sqrt(result.energy) - np.linalg.norm(delta)) <= room
    if room < 1e-6 * np.linalg.norm(delta):
        assert result.relative_error == pytest.approx(best / np.linalg.norm(delta), abs=1e-6)


@settings(max_examples=300, deadline=None)
@given(stack=stacks(), energy=st.sampled_from([1e-9, 0.3, 0.5, 0.9, 0.99, 0.9999]))
def test_the_least_rank_that_keeps_the_energy_is_kept(stack: Stack, energy: float) -> None:
    result = decompose(stack.factors, stack.basis).truncate(stack.weights, energy=energy)
    squares = np.linalg.svd(stack.delta, compute_uv=False) ** 2
    kept = result.factors.rank
    # each sum of squares moves by at most (norm + room)^2 - norm^2
    norm = np.linalg.norm(stack.delta)
    room = GUARDED * norm + STABLE * stack.size
    moved = 2 * ((norm + room) ** 2 - norm**2)
    assert kept >= 1
    assert squares[:kept].sum() >= energy * squares.sum() - moved
    assert kept == 1 or squares[: kept - 1].sum() <= energy * squares.sum() + moved


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_experts_of_usual_condition_meet_float64(dtype: torch.dtype) -> None:
    # random factors have a condition of about 10, so that Cholesky departs by 1e-14 alone; three experts, 16 kept
    factors = [random_factors(300, 200, 16, seed, dtype) for seed in range(3)]
    stack = Stack(factors, [0.5, 0.3, -0.2])
    result = decompose(factors).truncate(stack.weights, 16)
    u, values, vh = np.linalg.svd(stack.delta)
    np.testing.assert_allclose(dense(result), (u[:, :16] * values[:16]) @ vh[:16], rtol=0, atol=1e-11)
    assert result.lost == pytest.approx((values[16:] ** 2).sum(), rel=1e-12)
    assert result.energy == pytest.approx((values**2).sum(), rel=1e-12)


def test_one_decomposition_serves_every_user() -> None:
    factors = [random_factors(30, 20, 3, seed) for seed in range(3)]
    before = [(each.a_RI.clone(), each.b_OR.clone()) for each in factors]
    decomposition = decompose(factors)
    for weights in ([1.0, 0.0, 0.0], [0.2, 0.5, 0.3], [-1.0, 2.0, 0.0], [0.2, 0.5, 0.3]):
        np.testing.assert_allclose(
            dense(decomposition.truncate(weights, 9)), Stack(factors, weights).delta, rtol=0, atol=1e-11
        )
    for each, (a_RI, b_OR) in zip(factors, before, strict=True):
        assert torch.equal(each.a_RI, a_RI)
        assert torch.equal(each.b_OR, b_OR)


def test_one_expert_of_weight_one_is_given_back() -> None:
    factors = random_factors(30, 20, 3)
    for result in (truncate(factors, 3), truncate(factors, energy=1.0), decompose([factors]).truncate([1.0], 8)):
        np.testing.assert_allclose(dense(result), Stack([factors], [1.0]).delta, rtol=0, atol=1e-12)
        assert result.factors.rank == 3
        assert result.lost == 0


def test_experts_of_one_basis_merge_at_their_own_rank() -> None:
    a_RI = random_factors(30, 20, 4).a_RI
    factors = [Factors(a_RI, random_factors(30, 20, 4, seed).b_OR, seed) for seed in (1, 2, 3)]
    result = decompose(factors, [7, 7, 7]).truncate([0.5, -0.3, 0.8], 16)
    np.testing.assert_allclose(dense(result), Stack(factors, [0.5, -0.3, 0.8]).delta, rtol=0, atol=1e-11)
    assert result.factors.rank == 4


@pytest.mark.parametrize("doubled", [1, 3])
def test_all_of_the_energy_is_the_rank_that_there_is(doubled: int) -> None:
    result = decompose([random_factors(30, 20, 4)] * doubled).truncate([0.7] * doubled, energy=1.0)
    assert result.factors.rank == 4


def test_energy_shares_at_the_very_values() -> None:
    # singular values 2, 1, 1: squares 4, 1, 1 of 6
    factors = Factors(torch.eye(3), torch.diag(torch.tensor([1.0, 2.0, 1.0])))
    for energy, rank in ((0.1, 1), (0.66, 1), (0.67, 2), (0.83, 2), (0.84, 3), (1.0, 3)):
        result = truncate(factors, energy=energy)
        assert result.factors.rank == rank
        assert result.relative_error == pytest.approx(math.sqrt((3 - rank) / 6), abs=1e-9)


@pytest.mark.parametrize("kind", ["zero b", "zero weights"])
def test_a_delta_of_zero_has_no_error(kind: str) -> None:
    factors, weights = [random_factors(20, 30, 4)] * 2, [1.0, 1.0]
    if kind == "zero b":
        factors = [Factors(each.a_RI, torch.zeros_like(each.b_OR)) for each in factors]
    else:
        weights = [0.0, 0.0]
    for result in (decompose(factors).truncate(weights, 4), decompose(factors).truncate(weights, energy=0.9)):
        assert not dense(result).any()
        assert (result.energy, result.lost, result.relative_error) == (0, 0, 0)
    assert result.factors.rank == 1


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_any_scale_is_as_good(scale: float, dtype: torch.dtype) -> None:
    plain = [random_factors(30, 20, 5, seed, dtype) for seed in range(2)]
    scaled = [Factors(each.a_RI * scale, each.b_OR * scale, each.scaling) for each in plain]
    stack = Stack(scaled, [0.4, 0.6])
    result = decompose(scaled).truncate(stack.weights, 5)
    tail = np.linalg.svd(stack.delta, compute_uv=False)[5:]
    assert np.linalg.norm(stack.delta - dense(result)) == pytest.approx(np.linalg.norm(tail), rel=1e-11)
    assert result.relative_error == pytest.approx(np.linalg.norm(tail) / np.linalg.norm(stack.delta), rel=1e-11)


@pytest.mark.parametrize(
    ("apart", "is_orthonormal"), [(1.0, False), (1e-1, False), (1e-4, True), (1e-9, True), (0.0, True)]
)
def test_opposed_experts_that_nearly_agree(apart: float, is_orthonormal: bool) -> None:
    # what is left over is the part of B that Cholesky knows worst: the guard must have gone over to QR by then
    one, other = random_factors(60, 50, 6), random_factors(60, 50, 6, 1)
    stack = Stack([one, Factors(one.a_RI, one.b_OR + apart * other.b_OR, one.scaling)], [1.0, -1.0])
    decomposition = decompose(stack.factors)
    assert decomposition.left.is_orthonormal is is_orthonormal
    result = decomposition.truncate(stack.weights, 3)
    best = np.linalg.norm(np.linalg.svd(stack.delta, compute_uv=False)[3:])
    # GUARDED at this condition, some 100 / apart, or rounding of what was summed
    room = (24 * ROUNDOFF * (100 / apart) ** 2 if not is_orthonormal else 0) * best + STABLE * stack.size
    assert abs(np.linalg.norm(stack.delta - dense(result)) - best) <= room


def test_lengths_of_columns_do_not_send_to_qr() -> None:
    factors = random_factors(60, 50, 6)
    lengths = torch.logspace(0, -100, 6, dtype=torch.float64)
    decomposition = decompose([Factors(factors.a_RI / lengths[:, None], factors.b_OR * lengths, 1.5)])
    assert not decomposition.left.is_orthonormal
    np.testing.assert_allclose(
        dense(decomposition.truncate([1.0], 6)), Stack([factors], [1.0]).delta, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("length", [0.0, 1e-150, 1e160])
def test_columns_whose_squares_leave_float64_go_to_qr(length: float) -> None:
    factors = random_factors(60, 50, 6)
    factors.b_OR[:, 0] *= length
    factors.a_RI[0] *= 1e-30
    decomposition = decompose([factors])
    assert decomposition.left.is_orthonormal
    delta = Stack([factors], [1.0]).delta
    result = decomposition.truncate([1.0], 6)
    assert np.linalg.norm(delta - dense(result)) <= STABLE * np.linalg.norm(delta)


@pytest.mark.parametrize("seed", range(5))
def test_signs_are_fixed_and_factors_balanced(seed: int) -> None:
    result = truncate(random_factors(20, 30, 4, seed), 3).factors
    largest = result.b_OR.abs().argmax(dim=0)
    assert (result.b_OR[largest, torch.arange(3)] > 0).all()
    torch.testing.assert_close(result.a_RI.norm(dim=1), result.b_OR.norm(dim=0))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["a", "b", "scaling", "weight"])
@pytest.mark.parametrize("ranks", [(4, 4), (40, 40)], ids=["Cholesky", "QR"])
def test_what_is_not_finite_is_refused(value: float, place: str, ranks: tuple[int, int]) -> None:
    factors, weights = [random_factors(20, 30, rank, rank) for rank in ranks], [0.5, 0.5]
    if place == "a":
        factors[1].a_RI[2, 3] = value
    elif place == "b":
        factors[1].b_OR[2, 3] = value
    elif place == "scaling":
        factors[1] = Factors(factors[1].a_RI, factors[1].b_OR, value)
    else:
        weights[1] = value
    for cut in ({"rank": 2}, {"energy": 0.5}):
        with pytest.raises(ValueError, match="not finite"):
            decompose(factors).truncate(weights, **cut)


def test_a_squared_norm_beyond_float64_is_refused() -> None:
    factors = random_factors(20, 30, 4)
    with pytest.raises(ValueError, match=r"norm is 5\.57758e\+161 or more"):
        decompose([factors]).truncate([1e160], 2)


@pytest.mark.parametrize(
    ("rank", "energy", "match"),
    [
        (0, None, "rank is 0; it must be positive"),
        (-1, None, "must be positive"),
        (None, 0.0, "energy is 0.0; it must be above 0 and at most 1"),
        (None, 1.01, "energy is 1.01"),
        (None, math.nan, "energy is nan"),
        (None, None, "exactly one of rank and energy"),
        (3, 0.5, "exactly one of rank and energy"),
    ],
)
def test_a_cut_out_of_bounds_is_refused(rank: int | None, energy: float | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        truncate(random_factors(3, 3, 2), rank, energy)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, 1.0, 1.0]])
def test_a_weight_for_each_expert(weights: Sequence[float]) -> None:
    with pytest.raises(ValueError, match=r"zip\(\) argument"):
        decompose([random_factors(3, 3, 2)] * 2).truncate(weights, 1)


def test_no_factors_are_refused() -> None:
    with pytest.raises(ValueError, match="no factors"):
        decompose([])
