"""The number of operators that a mixed decode step dispatches.

On a GPU an operator is a launch; in a small model on a CPU its call costs more than its arithmetic. The count needs no
GPU and does not depend on the machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from personalized_soups import SoupModel
from personalized_soups.kernels import add_gated as kernel
from personalized_soups.kernels import launching
from personalized_soups.mixing.layers import grouping, weight_group
from tests.experts import write_expert
from tests.mixing.worlds import random_ids

LAYERS = 2
LEAVES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64), "self_attn.v_proj": (32, 64),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64), "mlp.down_proj": (64, 96),
}  # fmt: skip
NAMES = ("cold", "plain", "warm")
ROWS: list[dict[str, float]] = [{"cold": 0.5, "warm": 0.3}, {"plain": 1.0}, {"warm": -0.2}]

# Operators that return a view, which launch nothing on a GPU.
VIEWS = {"view", "t", "slice", "_unsafe_view", "expand", "unsqueeze", "alias", "transpose", "split", "split_with_sizes"}


class Counting(TorchDispatchMode):
    """Counts operators by their names."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        self.seen[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def step(model: Any) -> Counter[str]:
    """Return what one decode step of three rows dispatches."""
    ids = random_ids(len(ROWS), 4)
    with torch.no_grad():
        past = model(input_ids=ids, use_cache=True).past_key_values
        counting = Counting()
        with counting:
            model(input_ids=ids[:, :1], past_key_values=past, use_cache=True)
    return counting.seen


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    shapes = {f"model.layers.{layer}.{leaf}": shape for layer in range(LAYERS) for leaf, shape in LEAVES.items()}
    for seed, name in enumerate(NAMES):
        write_expert(tmp_path / "experts" / name, seed=seed, rank=4, shapes=shapes)
    return tmp_path / "experts"


def added(model: SoupModel, bare: Counter[str]) -> dict[str, float]:
    """Return how many operators of each name a mixed step adds to a bare step, for each decoder layer."""
    with model.mixture(list(ROWS)):
        mixed = step(model.model)
    return {name: (mixed[name] - bare[name]) / LAYERS for name in {*mixed, *bare} - VIEWS if mixed[name] != bare[name]}


def test_a_decoder_layer_takes_four_products_for_seven(
    small_base: Path, experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = SoupModel.from_pretrained(small_base, experts, device="cpu")
    bare = step(model.model)
    assert bare["mm"] == 7 * LAYERS + 1
    # one product for q, k and v, one for gate and up, two for o and down; a gate each; a B for each layer
    assert added(model, bare) == {"mm": 4 - 7, "mul": 4, "addmm_": 7}
    with model.mixture(list(ROWS)):
        views = sum(step(model.model)[name] for name in VIEWS) - sum(bare[name] for name in VIEWS)
    assert views / LAYERS <= 21  # 17 with torch 2.13, 21 with 2.8
    assert step(model.model) == bare
    # each layer separately
    for layer in model.layers.by_name.values():
        layer.group = None
    model.layers.groups.clear()
    assert added(model, bare) == {"mm": 7, "mul": 7, "addmm_": 7}


def test_where_weights_stay_the_as_are_one_product(
    small_base: Path, experts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grouping, "_MOST_NUMBERS_ON_CPU", 0)
    model = SoupModel.from_pretrained(small_base, experts, device="cpu")
    assert added(model, step(model.model)) == {"mm": 4, "mul": 7, "addmm_": 7}


@pytest.mark.parametrize("has_room", [True, False])
def test_with_the_kernel_a_decoder_layer_takes_eight_launches(
    small_base: Path, experts: Path, monkeypatch: pytest.MonkeyPatch, *, has_room: bool
) -> None:
    """Four products and four gated sums, where the bare base has seven products; eight products without room."""
    if not has_room:
        monkeypatch.setattr(weight_group, "_ROOM", 0)
        monkeypatch.setattr(weight_group, "_FEW_NUMBERS", 0)
    model = SoupModel.from_pretrained(small_base, experts, device="cpu")
    bare = step(model.model)
    launches = 0

    def launch(*_: Any) -> None:
        nonlocal launches
        launches += 1

    monkeypatch.setattr(launching, "is_usable", lambda _: True)
    monkeypatch.setattr(kernel, "launch", launch)
    assert added(model, bare) == {"mm": (4 if has_room else 8) - 7}
    assert launches == 2 * 4 * LAYERS  # of the prompt and of the step
