"""The kernels of LiveAdapter and merge_many: in Triton's interpreter, as machine code, and where they fail."""

from __future__ import annotations

import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups.kernels import launching, scale_columns, weighted_sums
from personalized_soups.merging.live.products import ColumnScale, Product, RowSum
from personalized_soups.methods.product import sums_of_stack
from tests.kernels.interpreter import needs_triton, num_passed

LAUNCHERS = [weighted_sums, scale_columns]


@pytest.mark.slow
@needs_triton
def test_the_kernels_in_tritons_interpreter() -> None:
    assert num_passed("interpreted_sums.py") == 126


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let kernels be launched with tensors of the CPU; the tests replace the launches."""
    monkeypatch.setattr(launching._State, "has_failed", False)
    monkeypatch.setattr(launching, "is_usable", lambda _: not launching._State.has_failed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products(dtype: torch.dtype) -> list[tuple[Product, Tensor]]:
    """Return products, and the coefficients to run them with."""
    return [
        (RowSum(random(5, 32), dtype), random(5, seed=1)),
        (ColumnScale(random(9, 6), [1, 2, 3], dtype), random(6, seed=2)),
    ]


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_live_products_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The kernels replaced by their formulas, which nothing else may overwrite."""

    def sums(weights_UE: Tensor, experts_EP: Tensor, out_UP: Tensor) -> None:
        out_UP.copy_(weights_UE @ experts_EP + 1)

    def scaled(pristine_OK: Tensor, scales_K: Tensor, out_OK: Tensor) -> None:
        out_OK.copy_(pristine_OK * scales_K + 1)

    monkeypatch.setattr(weighted_sums, "launch", sums)
    monkeypatch.setattr(scale_columns, "launch", scaled)
    experts_EP, pristine_OK = random(5, 32), random(9, 6)
    wanted = [random(5, seed=1) @ experts_EP + 1, pristine_OK * random(6, seed=2) + 1]
    for (each, coefficients), want in zip(products(dtype), wanted, strict=True):
        each.run(coefficients)
        assert torch.equal(each.live, want.to(dtype))


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_fails_changes_no_numbers(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("made up\nand more of it")

    for launcher in LAUNCHERS:
        monkeypatch.setattr(launcher, "launch", fails)
    with monkeypatch.context() as patch:
        patch.setattr(launching, "is_usable", lambda _: False)
        plain = products(dtype)
        for each, coefficients in plain:
            each.run(coefficients)
    found = products(dtype)
    with pytest.warns(RuntimeWarning, match="RuntimeError: made up"):
        found[0][0].run(found[0][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the warning is given once
        found[1][0].run(found[1][1])
        sums_of_stack(random(2, 5), random(5, 32))
    for (one, _), (other, _) in zip(found, plain, strict=True):
        assert torch.equal(one.live, other.live)
        assert one.live.any()


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_memory_that_runs_out_is_no_fault_of_the_kernel(monkeypatch: pytest.MonkeyPatch, launcher: Any) -> None:
    def fails(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(launcher, "launch", fails)
    each, coefficients = products(torch.float32)[LAUNCHERS.index(launcher)]
    with pytest.raises(torch.OutOfMemoryError):
        each.run(coefficients)
    assert not launching._State.has_failed


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_many_users_sums_take_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []

    def sums(weights_UE: Tensor, experts_EP: Tensor, out_UP: Tensor) -> None:
        launched.append(experts_EP.dtype)
        out_UP.copy_(weights_UE @ experts_EP)

    monkeypatch.setattr(weighted_sums, "launch", sums)
    for dtype in (torch.float32, torch.float64):
        weights, stack = random(16, 6).to(dtype), random(6, 200_000, seed=1).to(dtype)
        assert torch.equal(sums_of_stack(weights, stack), weights @ stack)
    # float64 is not for the kernel, which adds up in float32
    assert launched == [torch.float32]


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", ["one user", "16 users", 96, 24, 12])
def test_experts_are_read_sixteen_bytes_at_a_time(shape: str | int, dtype: torch.dtype) -> None:
    """What a GPU's rate hangs on and no result shows: wide reads, and no detour through shared memory in the loop."""
    from tests.kernels import ahead_of_time

    def launch() -> None:
        if isinstance(shape, int):
            scale_columns.launch(torch.empty(5000, shape), torch.empty(shape), torch.empty(5000, shape, dtype=dtype))
        else:
            users = 1 if shape == "one user" else 16
            out = torch.empty(users, 4096, dtype=dtype)
            weighted_sums.launch(torch.empty(users, 6), torch.empty(6, 4096), out)

    (recorded,) = ahead_of_time.recorded(iter([launch]))
    assembly = ahead_of_time.built(recorded, 90).asm["ptx"]
    # a thread's reads of experts in a program, and of coefficients, which are read singly
    wide, single = {"one user": (2, 1), "16 users": (1, 8)}.get(str(shape), (8, 1))
    assert len(re.findall(r"ld\.global\.v4\.b32", assembly)) >= wide
    assert len(re.findall(r"ld\.global\.b32", assembly)) <= single
    if not isinstance(shape, int):
        loop = assembly[: assembly.rindex("ld.global")]
        assert "bar.sync" not in loop
