from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups.methods.sparsify import (
    drop,
    drop_small,
    global_threshold,
    matched,
    num_kept,
    scaled,
    threshold,
    trim,
)
from personalized_soups.methods.streams import Stream


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def kth_largest(tensors: list[Tensor], k: int) -> float:
    magnitudes = sorted(
        (abs(value) for tensor in tensors for value in tensor.double().flatten().tolist()), reverse=True
    )
    return float(magnitudes[k - 1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_the_threshold_is_the_kth_magnitude(dtype: torch.dtype, density: float) -> None:
    delta = randn(37, 61, dtype=dtype)
    assert threshold(delta, density) == kth_largest([delta], int(density * delta.numel()))


@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1.0, 1e38])
def test_the_threshold_is_exact_at_every_magnitude(scale: float) -> None:
    delta = torch.tensor([[-3.0, 1.0, 2.0, -2.0, 0.0, -0.0]], dtype=torch.float32) * scale
    for k, want in enumerate([3.0, 2.0, 2.0, 1.0, 0.0], start=1):
        assert threshold(delta, (k + 0.5) / 6) == abs(float(torch.tensor(want) * scale))


def test_over_several_deltas_in_several_passes() -> None:
    deltas = [randn(11, 13, seed=seed) * 10**seed for seed in range(-2, 2)]
    calls = []

    def stream() -> Iterator[Tensor]:
        calls.append(0)
        yield from deltas

    for density in (0.01, 0.2, 0.7):
        k = int(density * 4 * 143)
        assert global_threshold(stream, density) == kth_largest(deltas, k)
    # the first is looked at for its dtype alone, then two passes
    assert len(calls) == 9


def test_k_of_nothing_and_of_all() -> None:
    delta = randn(3, 5)
    assert threshold(delta, 1.0) == 0.0
    assert threshold(delta, 0.05) == math.inf  # int(0.75) is 0
    assert threshold(delta, 0.05, at_least=1) == float(delta.abs().max())
    assert global_threshold(lambda: (), 0.5) == 0.0
    assert threshold(torch.zeros(0, 4), 0.5, at_least=1) == 0.0
    assert [num_kept(0.29, 100), num_kept(0.5, 5), num_kept(0.1, 5, 1), num_kept(0.5, 0, 1)] == [28, 2, 1, 0]


def test_trim_keeps_what_is_not_below() -> None:
    delta = torch.tensor([[0.5, -0.5, 0.25, -0.75], [0.49999997, -0.0, 0.5000001, 1.0]])
    before = delta.clone()
    kept = trim(0.5)(delta, 0)
    assert torch.equal(kept, torch.tensor([[0.5, -0.5, 0.0, -0.75], [0.0, 0.0, 0.5000001, 1.0]]))
    assert not trim(math.inf)(delta, 0).any()
    assert torch.equal(trim(0.0)(delta, 0), before)
    smallest = torch.tensor([[2.0**-149, -(2.0**-149), 0.0]])
    assert torch.equal(trim(2.0**-149)(smallest, 0), smallest)
    assert torch.equal(delta, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_trim_keeps_exactly_k_where_nothing_ties(dtype: torch.dtype) -> None:
    delta = randn(64, 33, dtype=torch.float64).to(dtype)
    for density in (0.05, 0.5, 0.95):
        kept = trim(threshold(delta, density))(delta, 0)
        assert int((kept != 0).sum()) == int(density * delta.numel())
        assert torch.equal(kept[kept != 0], delta[kept != 0])


def test_drop_keeps_what_its_words_say_in_any_block() -> None:
    delta, stream, density = randn(40, 25), Stream.of(1, "m", "e"), 0.3
    words = stream.words(1000).numpy().astype(np.int64) + 2**31
    mask = (words < round(density * 2**32)).reshape(40, 25)
    keep = drop(density, stream)
    np.testing.assert_array_equal(keep(delta, 0).numpy(), np.where(mask, delta.numpy(), 0))
    assert torch.equal(keep(delta[7:9], 7 * 25), keep(delta, 0)[7:9])
    assert drop(1.0, stream)(delta, 0) is delta


@pytest.mark.parametrize("density", [2.0**-30, 0.01, 0.5, 0.99])
def test_drop_keeps_its_share(density: float) -> None:
    """Kept ones are binomial: six standard deviations, and one for where n density is small."""
    n = 2**20
    kept = int((drop(density, Stream.of(4, "share"))(torch.ones(1024, 1024), 0) != 0).sum())
    assert abs(kept - n * density) <= 6 * math.sqrt(n * density * (1 - density)) + 1


def della_oracle(delta: Tensor, density: float, epsilon: float, stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """The mask and the probabilities, row by row, from the words."""
    rows, width = delta.shape
    words = (stream.words(delta.numel()).numpy().astype(np.int64) + 2**31).reshape(rows, width)
    mask, probability = np.zeros((rows, width), bool), np.zeros((rows, width))
    for row in range(rows):
        order = np.argsort(delta[row].abs().numpy(), kind="stable")
        for rank, column in enumerate(order):
            share = rank / (width - 1) if width > 1 else 0.5
            probability[row, column] = density - epsilon + 2 * epsilon * share
            mask[row, column] = words[row, column] < probability[row, column] * 2**32
    return mask, probability


@pytest.mark.parametrize(("shape", "epsilon"), [((9, 17), 0.2), ((5, 1), 0.2), ((4, 2), 0.4), ((6, 8), 0.0)])
def test_drop_small_ranks_each_row(shape: tuple[int, int], epsilon: float) -> None:
    delta = torch.round(randn(*shape) * 4)  # with equal magnitudes
    stream = Stream.of(2, "della")
    mask, probability = della_oracle(delta, 0.5, epsilon, stream)
    kept = drop_small(0.5, epsilon, stream, rescales=False)(delta, 0)
    np.testing.assert_array_equal(kept.numpy(), np.where(mask, delta.numpy(), 0))
    divided = drop_small(0.5, epsilon, stream, rescales=True)(delta, 0)
    # p is rounded to float32 and so is the quotient
    np.testing.assert_allclose(divided.numpy(), np.where(mask, delta.numpy() / probability, 0), rtol=2 * 2.0**-24)
    if len(delta) > 2:
        part = drop_small(0.5, epsilon, stream, rescales=True)(delta[1:3], shape[1])
        assert torch.equal(part, divided[1:3])


def test_ranks_are_the_same_in_every_dtype() -> None:
    """float32 is ranked by packed keys, float64 by a stable argsort: the same entries are kept."""
    delta = torch.round(randn(30, 200) * 8) / 8
    delta[3] = 0
    delta[4] *= -(2.0**-140)
    keep = drop_small(0.5, 0.3, Stream.of(3, "ranks"), rescales=False)
    assert torch.equal(keep(delta, 0).double(), keep(delta.double(), 0))
    ones = torch.ones(30, 200)
    assert not torch.equal(keep(ones, 0) != 0, keep(torch.arange(200.0).flip(0).expand(30, 200) + 1, 0) != 0)


def test_drop_small_at_its_edges() -> None:
    delta = randn(200, 50)
    assert drop_small(1.0, 0.0, Stream(0), rescales=True)(delta, 0) is delta
    # at density + epsilon = 1 the largest of each row is certain
    kept = drop_small(0.75, 0.25, Stream(0), rescales=False)(delta, 0)
    largest = delta.abs().argmax(dim=1, keepdim=True)
    assert (kept.gather(1, largest) != 0).all()
    for density, epsilon in ((0.3, 0.3), (0.3, 0.4), (0.9, 0.2)):
        with pytest.raises(ValueError, match="must be above 0 and at most 1"):
            drop_small(density, epsilon, Stream(0), rescales=True)


def test_matched_has_the_l1_norm_of_the_whole() -> None:
    delta, keep = randn(70, 90), drop(0.3, Stream(9))
    kept = matched(keep, delta)(delta, 0)
    # the scale is float64, the product rounded once: 2^-24 an element, and so of the sum of magnitudes
    assert float(kept.double().abs().sum()) == pytest.approx(float(delta.double().abs().sum()), rel=2.0**-23)
    tiny, most = torch.full((20, 20), 1e-10), drop(0.9, Stream(9))
    assert most(tiny, 0).any()
    assert matched(most, tiny) is most
    none = drop(2.0**-32, Stream(9))
    assert matched(none, delta[:2, :2]) is none


def test_scaled_divides() -> None:
    delta = randn(4, 4)
    assert torch.equal(scaled(trim(0.0), 0.5)(delta, 0), delta * 2)
    keep = trim(0.5)
    assert scaled(keep, 1.0) is keep
