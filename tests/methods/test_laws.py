"""Laws that hold for every method of the table, regardless of its formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups.methods.factors import Factors
from personalized_soups.methods.method import Method
from personalized_soups.methods.options import OPTIONS
from personalized_soups.methods.streams import Stream
from personalized_soups.methods.table import METHODS

ALL = {"density": 1.0, "epsilon": 0.0, "lambda": 1.0, "seed": 3}


def expert(seed: int, *, rank: int = 4, scaling: float = 4.0, dtype: torch.dtype = torch.float32) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(rank, 30, generator=generator), torch.randn(20, rank, generator=generator)
    return Factors(a.to(dtype), b.to(dtype), scaling)


def merged(row: Method, experts: Sequence[Factors], weights: Sequence[float], **given: float) -> Tensor:
    """The delta that the row's function makes, called as its row says."""
    given = {"lambda" if name == "lambda_" else name: value for name, value in given.items()}
    options = row.resolved({name: value for name, value in given.items() if name in row.options})
    keywords: dict[str, Any] = {OPTIONS[name].keyword: value for name, value in options.items() if name != "seed"}
    if row.is_random:
        # an expert's stream depends on its name; here its first number identifies it
        keywords["streams"] = [Stream.of(int(options["seed"]), f"{float(each.a_RI[0, 0]):.6g}") for each in experts]
    if row.family == "dense":
        delta: Tensor = row.load()([each.delta() for each in experts], weights, **keywords)
        return delta
    factors: Factors = row.load()(experts, weights, **keywords)
    return factors.delta()


@pytest.fixture(params=list(METHODS))
def row(request: pytest.FixtureRequest) -> Method:
    return METHODS[request.param]


def test_one_expert_of_weight_1_comes_back(row: Method) -> None:
    """Exactly: a scaling of 4 has an exact root. KnOTS goes through a decomposition in float64 and rounds A and B.

    The two roundings to float32 move an entry by 2^-24 of `sum |b| |a|` each; the factors are balanced, and that sum
    is below sqrt(rank) times the largest singular value.
    """
    part = expert(0)
    got = merged(row, [part], [1.0], **ALL)
    if row.name == "knots":
        bound = 3 * 2.0**-24 * 2 * float(torch.linalg.matrix_norm(part.delta().double(), 2))
        assert float((got.double() - part.delta().double()).abs().max()) < bound
    else:
        assert torch.equal(got, part.delta())


def test_arguments_are_left_alone(row: Method) -> None:
    experts = [expert(seed) for seed in range(3)]
    before = [(each.a_RI.clone(), each.b_OR.clone()) for each in experts]
    weights = [0.5, 0.25, -1.0]
    merged(row, experts, weights)
    assert weights == [0.5, 0.25, -1.0]
    for each, (a, b) in zip(experts, before, strict=True):
        assert torch.equal(each.a_RI, a)
        assert torch.equal(each.b_OR, b)


def test_a_dense_result_is_new_and_no_view_of_a_delta(row: Method) -> None:
    if row.family != "dense":
        pytest.skip("factors of a single expert may be its own: nothing writes to them")
    delta = expert(0).delta()
    keywords: dict[str, Any] = {OPTIONS[n].keyword: v for n, v in ALL.items() if n in row.options and n != "seed"}
    if row.is_random:
        keywords["streams"] = [Stream(0)]
    got = row.load()([delta], [1.0], **keywords)
    got.zero_()
    assert delta.any()


def test_order_is_of_no_account(row: Method) -> None:
    experts, weights = [expert(seed) for seed in range(3)], [0.5, 0.25, 0.125]
    one = merged(row, experts, weights)
    other = merged(row, experts[::-1], weights[::-1])
    # sums in another order: 3 roundings of terms that are below 60 here
    torch.testing.assert_close(one, other, rtol=1e-6, atol=4 * 60 * 2.0**-24)


def test_a_draw_depends_on_seed_and_name_alone(row: Method) -> None:
    experts = [expert(seed) for seed in range(2)]
    once = merged(row, experts, [0.5, 0.25])
    assert torch.equal(merged(row, experts, [0.5, 0.25]), once)
    assert torch.equal(merged(row, experts, [0.5, 0.25], seed=1), once) is not row.is_random


def test_zero_deltas_give_zeros(row: Method) -> None:
    parts = [Factors(each.a_RI, torch.zeros_like(each.b_OR), each.scaling) for each in map(expert, range(2))]
    got = merged(row, parts, [0.5, -0.25])
    assert got.shape == (20, 30)
    assert torch.isfinite(got).all()
    assert not got.any()


def test_an_expert_of_zeros_counts_for_nothing_but_in_the_factor_averages(row: Method) -> None:
    """An expert without a module is left out of the lists: for the soup that is an expert whose delta is 0."""
    if row.name.startswith("factor_"):
        pytest.skip("A's and B's are merged apart: an A without its B has its say")
    experts = [expert(seed) for seed in range(2)]
    idle = Factors(expert(5).a_RI, torch.zeros(20, 4), 4.0)
    without = merged(row, experts, [0.5, 0.25])
    torch.testing.assert_close(merged(row, [*experts, idle], [0.5, 0.25, 1.0]), without, rtol=1e-6, atol=1e-5)


def test_negating_every_weight_negates_the_soup(row: Method) -> None:
    experts = [expert(seed) for seed in range(3)]
    one = merged(row, experts, [0.5, 0.25, 0.125])
    if row.name == "factor_average":
        pytest.skip("its weights are divided by their sum, and their products have no sign")
    sign = 1 if row.name in {"ties@mergekit", "della@mergekit"} else -1  # their divisor is negated too
    other = merged(row, experts, [-0.5, -0.25, -0.125])
    torch.testing.assert_close(other, sign * one, rtol=1e-6, atol=1e-5)


def test_the_dtype_is_that_of_the_experts(row: Method) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        experts = [expert(seed, dtype=dtype) for seed in range(2)]
        assert merged(row, experts, [0.5, 0.25]).dtype == dtype


def test_it_is_refused_to_merge_nothing(row: Method) -> None:
    with pytest.raises(ValueError, match=r"no (deltas|factors)"):
        merged(row, [], [])
    with pytest.raises(ValueError, match=r"zip\(\)|equal|sizes"):
        merged(row, [expert(0)], [1.0, 2.0])
