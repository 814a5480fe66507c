from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups.launching.threads import in_order
from personalized_soups.merging.computing import blocks
from personalized_soups.merging.computing.blocks import FoldedBlock, Queue, folded_blocks, queued_blocks
from personalized_soups.merging.computing.terms import Dense, Product, Rescale, Term, Toward, TowardRows
from tests.merging.computing.queues import EagerQueue, LazyQueue

CPU = torch.device("cpu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def folded(base: Tensor, *soups: Sequence[Term], device: torch.device = CPU) -> list[Tensor]:
    """Return every soup's whole tensor."""
    return joined(base, len(soups), folded_blocks(base, soups, device))


def joined(base: Tensor, num_soups: int, found: Iterable[FoldedBlock]) -> list[Tensor]:
    out = [torch.full_like(base, float("nan")) for _ in range(num_soups)]
    for block in found:
        out[block.soup][block.start : block.start + block.rows_BN.shape[0]] = block.rows_BN
    return out


def terms_of_every_kind(rows: int, columns: int) -> tuple[list[Term], np.ndarray]:
    """Return terms, and the sum of `random(rows, columns)` and the terms in float64 NumPy."""
    left, right = random(rows - 3, 5, seed=1), random(5, columns, seed=2)
    delta, value = random(rows, columns, seed=3), random(rows, columns, seed=4)
    index = torch.tensor([rows - 1, 0, 7])
    some = random(3, columns, seed=5)
    scale = random(rows, seed=6).double()
    w = random(rows, columns).double().numpy()
    added = delta.double().numpy() + 0.25 * (value.double().numpy() - w) + (scale.numpy()[:, None] - 1) * w
    added[2 : rows - 1] += left.double().numpy() @ right.double().numpy()
    for place, row in zip(index.tolist(), some.double().numpy(), strict=True):
        added[place] += -0.5 * (row - w[place])
    terms: list[Term] = [
        Product(left, right, 2),
        Dense(delta),
        Toward(value, 0.25),
        TowardRows(index, some, -0.5),
        Rescale(scale, 0),
    ]
    return terms, added


@pytest.mark.parametrize("block", [16, 1 << 10, 1 << 20])
def test_every_term_adds_what_float64_says(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setitem(blocks._BLOCK, "cpu", block)
    terms, added = terms_of_every_kind(41, 16)
    base = random(41, 16)
    (got,) = folded(base, terms)
    want = base.double().numpy() + added
    # a dozen roundings in float32, each of a partial sum that is below 40
    assert np.abs(got.double().numpy() - want).max() < 12 * 2.0**-24 * 40


@pytest.mark.parametrize("queue", [EagerQueue, LazyQueue])
@pytest.mark.parametrize("num_soups", [1, 2, 3])
@pytest.mark.parametrize("block", [16, 7 * 16, 1 << 20])
def test_blocks_of_a_queue_are_those_of_the_cpu(
    monkeypatch: pytest.MonkeyPatch, block: int, num_soups: int, queue: Callable[[], Queue]
) -> None:
    """The GPU's path without the stream: no buffer may be reused before host and device have finished with it."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", block)
    base = random(41, 16).bfloat16()
    soups = [terms_of_every_kind(41, 16)[0][: 5 - number] for number in range(num_soups)]
    found = joined(base, num_soups, queued_blocks(base, soups, CPU, base.dtype, queue()))
    for got, want in zip(found, folded(base, *soups), strict=True):
        assert torch.equal(got, want)


def test_two_blocks_are_under_way_and_none_is_left() -> None:
    base, queue = random(41, 16), LazyQueue()
    found = queued_blocks(base, [[], [], []], CPU, base.dtype, queue)
    next(found)
    assert (queue.most, len(queue.waiting)) == (2, 1)
    found.close()  # type: ignore[attr-defined]
    assert not queue.waiting


@pytest.mark.parametrize(("value", "is_finite"), [(1.0, True), (65504.0, True), (float("inf"), False)])
def test_a_block_brings_along_whether_it_is_finite(
    monkeypatch: pytest.MonkeyPatch, value: float, *, is_finite: bool
) -> None:
    """A float16 sum of many finite numbers can overflow, so the check sums in float32."""
    monkeypatch.setitem(blocks._BLOCK, "cpu", 16)
    base = torch.ones(4, 16, dtype=torch.float16)
    base[2] = value
    looked_at: list[Tensor] = []

    def all_finite(rows: Tensor) -> bool:
        looked_at.append(rows)
        return bool(rows.isfinite().all())

    monkeypatch.setattr(blocks, "all_finite", all_finite)
    found = [block.is_finite() for block in queued_blocks(base, [[]], CPU, base.dtype, EagerQueue())]
    assert found == [True, True, is_finite, True]
    assert len(looked_at) == (not is_finite)
    # finite numbers whose sum is not
    rows = torch.full((2, 1), 3e38)
    assert FoldedBlock(0, 0, rows, rows.sum()).is_finite()


@pytest.mark.gpu
def test_a_gpu_agrees() -> None:
    device = torch.device("cuda")
    left, right, base = random(4000, 48, seed=1), random(48, 5000, seed=2), random(4000, 5000)
    (on_cpu,) = folded(base, [Product(left, right)])
    (on_gpu,) = folded(base, [Product(left.to(device), right.to(device))], device=device)
    assert float((on_gpu - on_cpu).norm() / on_cpu.norm()) < 1e-6


def test_columns_are_rescaled_too() -> None:
    base, scale = random(5, 3), torch.tensor([0.5, 1.0, -2.0], dtype=torch.float64)
    (got,) = folded(base, [Rescale(scale, 1)])
    torch.testing.assert_close(got, (base.double() * scale).float(), rtol=2**-22, atol=2**-22)


def test_a_soup_is_the_same_alone_and_among_others() -> None:
    base = random(300, 64).bfloat16()
    soups = [[Product(random(300, 8, seed=n), random(8, 64, seed=n + 10))] for n in range(3)]
    together = folded(base, *soups)
    for soup, got in zip(soups, together, strict=True):
        assert torch.equal(folded(base, soup)[0], got)


def test_bytes_are_equal_at_any_thread_count() -> None:
    base, left, right = random(700, 513).bfloat16(), random(700, 48, seed=1), random(48, 513, seed=2)
    before = torch.get_num_threads()
    results = [
        next(iter(in_order(lambda _: folded(base, [Product(left, right)])[0], range(4), threads)))
        for threads in (1, 2, 4)
    ]
    assert torch.get_num_threads() == before
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_double_precision_weight_is_accumulated_in_double() -> None:
    base = torch.tensor([[1.0]], dtype=torch.float64)
    (got,) = folded(base, [Dense(torch.tensor([[2.0**-40]], dtype=torch.float64))])
    assert got.item() == 1 + 2.0**-40


def test_the_sum_is_rounded_once() -> None:
    """In bfloat16, 1 + 2^-9 rounds to 1: three such terms change the result only if they are added before rounding."""
    base = torch.ones(1, 1, dtype=torch.bfloat16)
    step = torch.full((1, 1), 2.0**-9)
    (got,) = folded(base, [Dense(step), Dense(step), Dense(step)])
    assert got.item() == 1 + 2.0**-7
