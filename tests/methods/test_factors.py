from __future__ import annotations

import math

import pytest
import torch

from personalized_soups.methods.factors import Factors, cancels, factor_average, factor_linear
from personalized_soups.methods.linear import linear


def random_factors(seed: int, *, rank: int = 3, scaling: float = 2.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator), scaling)


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="do not multiply"):
        Factors(torch.ones(2, 7), torch.ones(5, 3))


def test_linear_stacks_and_leaves_its_arguments_alone() -> None:
    parts = [random_factors(0, rank=2), random_factors(1, rank=4, scaling=0.5)]
    before = [(part.a_RI.clone(), part.b_OR.clone()) for part in parts]
    soup = linear(parts, [0.5, -3.0])
    assert soup.rank == 6
    assert soup.scaling == 1
    assert torch.equal(soup.a_RI, torch.cat([part.a_RI for part in parts]))
    assert torch.equal(soup.b_OR[:, 2:], parts[1].b_OR * -1.5)  # a power of two and a half: exact
    for part, (a, b) in zip(parts, before, strict=True):
        assert torch.equal(part.a_RI, a)
        assert torch.equal(part.b_OR, b)


def test_linear_rounds_a_coefficient_and_its_product_once() -> None:
    part = Factors(torch.ones(1, 1), torch.tensor([[0.1]]), 1 / 3)
    want = torch.tensor(float(torch.tensor(0.1)) * (0.7 / 3), dtype=torch.float64).float()
    assert linear([part], [0.7]).b_OR.item() == want.item()


def test_linear_sums_the_bs_of_one_basis() -> None:
    a = torch.randn(2, 7, generator=torch.Generator().manual_seed(0))
    parts = [Factors(a, random_factors(seed, rank=2).b_OR, 1.0) for seed in range(3)]
    soup = linear(parts, [0.5, 0.25, -1.0], basis=[0, 1, 0])
    assert soup.rank == 4
    torch.testing.assert_close(soup.b_OR[:, :2], 0.5 * parts[0].b_OR - parts[2].b_OR)


@pytest.mark.parametrize("method", [linear, factor_average, factor_linear])
def test_methods_of_nothing_and_of_unequal_lengths_are_refused(method: object) -> None:
    assert callable(method)
    with pytest.raises(ValueError, match="no factors"):
        method([], [])
    with pytest.raises(ValueError, match=r"zip\(\)"):
        method([random_factors(0)], [1.0, 2.0])


def test_the_factor_methods_say_what_must_be_equal() -> None:
    unequal_ranks = [random_factors(0, rank=2), random_factors(1, rank=3)]
    for method in (factor_average, factor_linear):
        with pytest.raises(ValueError, match="needs equal ranks, these are 2, 3"):
            method(unequal_ranks, [1.0, 1.0])
    with pytest.raises(ValueError, match="equal scalings, these are 1, 2"):
        factor_average([random_factors(0), random_factors(1, scaling=1.0)], [1.0, 1.0])
    with pytest.raises(ValueError, match="divides by the sum"):
        factor_average([random_factors(0), random_factors(1)], [1.0, -1.0])


def test_factor_linear_has_the_sign_on_a_alone() -> None:
    part = random_factors(0)
    soup = factor_linear([part], [-0.5])
    root = math.sqrt(0.5 * 2.0)
    torch.testing.assert_close(soup.a_RI, -root * part.a_RI)
    torch.testing.assert_close(soup.b_OR, root * part.b_OR)


@pytest.mark.parametrize(
    ("weights", "want"), [([1.0, -1.0], True), ([1.0, -1.0 + 1e-7], True), ([1.0, -0.999], False), ([0.0], True)]
)
def test_weights_that_cancel_are_seen_at_any_scale(weights: list[float], want: bool) -> None:
    for scale in (1e-20, 1.0, 1e20):
        assert cancels([weight * scale for weight in weights]) is want
