from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft.tuners.lora.model import LoraModel

from personalized_soups.methods.factors import (
    Factors,
    cancels,
    factor_average,
    factor_dare_linear,
    factor_dare_ties,
    factor_linear,
    factor_magnitude_prune,
    factor_ties,
)
from personalized_soups.methods.linear import linear
from personalized_soups.methods.sparsify import drop
from personalized_soups.methods.streams import Stream


def random_factors(seed: int, *, rank: int = 3, scaling: float = 2.0) -> Factors:
    generator = torch.Generator().manual_seed(seed)
    return Factors(torch.randn(rank, 7, generator=generator), torch.randn(5, rank, generator=generator), scaling)


def test_factors_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot be multiplied"):
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
        with pytest.raises(ValueError, match="needs equal ranks, not 2, 3"):
            method(unequal_ranks, [1.0, 1.0])
    with pytest.raises(ValueError, match="equal scalings, not 1, 2"):
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


def merged_by_peft(
    parts: list[Factors], weights: list[float], rule: str, density: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of PEFT's own add_weighted_adapter, without a model around its layer."""
    layers = {str(number): part for number, part in enumerate(parts)}
    target = SimpleNamespace(
        lora_A={name: SimpleNamespace(weight=torch.nn.Parameter(part.a_RI)) for name, part in layers.items()},
        lora_B={name: SimpleNamespace(weight=torch.nn.Parameter(part.b_OR)) for name, part in layers.items()},
        lora_embedding_A={},
        scaling={name: part.scaling for name, part in layers.items()},
    )
    merge: Any = LoraModel._generalized_task_arithmetic_weighted_adapter
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1.0 is greater than or equal to 1")
        a, b = merge(None, rule, list(layers), weights, target, density, "total")
    return a, b


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.7, 0.2, 0.1], [0.5, -1.0, 0.3]])
@pytest.mark.parametrize("density", [0.3, 1.0])
@pytest.mark.parametrize("rule", ["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_the_factor_methods_are_pefts(
    monkeypatch: pytest.MonkeyPatch, rule: str, density: float, weights: list[float]
) -> None:
    parts = [random_factors(seed, rank=4, scaling=2.0 / (seed + 1)) for seed in range(3)]
    streams = [Stream.of(0, str(number)) for number in range(3)]
    masks = iter([
        drop(density, stream.child(side))(torch.ones(shape), 0)
        for side, shape in (("A", (4, 7)), ("B", (5, 4)))
        for stream in streams
    ])  # fmt: skip
    monkeypatch.setattr(torch, "bernoulli", lambda *_args, **_kwargs: next(masks))
    a, b = merged_by_peft(parts, weights, rule, density)
    got = {
        "linear": lambda: factor_linear(parts, weights),
        "magnitude_prune": lambda: factor_magnitude_prune(parts, weights, density=density),
        "ties": lambda: factor_ties(parts, weights, density=density),
        "dare_linear": lambda: factor_dare_linear(parts, weights, density=density, streams=streams),
        "dare_ties": lambda: factor_dare_ties(parts, weights, density=density, streams=streams),
    }[rule]()
    # PEFT rounds the roots, each product, each sum and the quotient in float32, and so do we but for the roots:
    # 6 roundings each of terms whose magnitudes add up to less than 3 * 4 / density
    torch.testing.assert_close(got.a_RI, a, rtol=12 * 2.0**-24, atol=12 * 2.0**-24 * 12 / density)
    torch.testing.assert_close(got.b_OR, b, rtol=12 * 2.0**-24, atol=12 * 2.0**-24 * 12 / density)
    assert got.scaling == 1.0


def test_a_and_b_are_dropped_apart() -> None:
    part = Factors(torch.ones(6, 6), torch.ones(6, 6))
    soup = factor_dare_linear([part], [1.0], density=0.5, streams=[Stream.of(0, "e")])
    assert not torch.equal(soup.a_RI, soup.b_OR)
    assert set(soup.a_RI.unique().tolist()) == {0.0, 2.0}


def test_the_sparse_factor_methods_need_equal_ranks_too() -> None:
    unequal, streams = [random_factors(0, rank=2), random_factors(1, rank=3)], [Stream(0), Stream(1)]
    for method in (factor_magnitude_prune, factor_ties):
        with pytest.raises(ValueError, match=f"{method.__name__} needs equal ranks, not 2, 3"):
            method(unequal, [1.0, 1.0], density=0.5)
    for drawn in (factor_dare_linear, factor_dare_ties):
        with pytest.raises(ValueError, match=f"{drawn.__name__} needs equal ranks, not 2, 3"):
            drawn(unequal, [1.0, 1.0], density=0.5, streams=streams)
