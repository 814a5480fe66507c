"""An adapter below experts on layers of every kind: Conv1D, convolutions, parameters of a mixture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base, verify
from tests.adapters.test_against_peft import CONVOLUTIONS, EXPERTS, Convolutions, gpt2, gpt_oss, llama, mixtral
from tests.merging.variants import World, make_world, read
from tests.merging.writing.test_variants_into_base import check

WEIGHTS = {"e1": 0.7, "e2": -0.4}

# By kind: a base, and the configurations of the adapter (e0) and of two experts.
KINDS: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "linear": (
        llama,
        [
            {"target_modules": ["q_proj", "o_proj"], "use_rslora": True, "r": 3, "rank_pattern": {"o_proj": 2}},
            {"target_modules": ["q_proj", "v_proj"]},
            {"target_modules": ["v_proj"], "r": 2, "alpha_pattern": {"v_proj": 5}},
        ],
    ),
    "conv1d": (
        gpt2,
        [
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
            {"target_modules": ["c_fc"], "fan_in_fan_out": True, "r": 2},
        ],
    ),
    "convolutions": (
        Convolutions,
        [
            {"target_modules": CONVOLUTIONS, "use_rslora": True},
            {"target_modules": ["one", "two"]},
            {"target_modules": ["two", "three"], "r": 2},
        ],
    ),
    "experts of a mixture": (
        mixtral,
        [
            {"target_modules": ["v_proj"], "target_parameters": EXPERTS, "r": 2},
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
            {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 3},
        ],
    ),
    "transposed experts": (
        gpt_oss,
        [
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
            {"target_modules": ["v_proj"], "target_parameters": EXPERTS},
            {"target_modules": ["v_proj"], "target_parameters": EXPERTS[1:], "r": 2},
        ],
    ),
}


@pytest.fixture(params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path: Path) -> World:
    make, configs = KINDS[request.param]
    return make_world(tmp_path / "world", make, configs)


def experts_of(world: World) -> ExpertLibrary:
    return ExpertLibrary.open(*(world.experts[name].folder for name in WEIGHTS))


def check_models(world: World, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    """Check every tensor, with the room of the merges that PEFT made of each single adapter."""
    assert got
    for name, tensor in got.items():
        size = torch.stack([each.merged[name].double().abs() for each in world.experts.values()]).sum(dim=0)
        check(tensor, want[name], size + world.tensors[name].double().abs(), name)


def test_the_model_is_base_adapter_and_soup(world: World, tmp_path: Path) -> None:
    on = world.experts["e0"].folder
    out = merge_into_base(
        experts_of(world), Profile(weights=WEIGHTS), world.base, tmp_path / "model", MergeOptions(on=on)
    )
    check_models(world, read(out), dict(world.soup({"e0": 1.0, **WEIGHTS})))
    assert verify(out).is_sound


def test_the_adapter_holds_adapter_and_soup(world: World, tmp_path: Path) -> None:
    """Merged into the base as a single expert, the written adapter gives the same model."""
    on = world.experts["e0"].folder
    soup = merge(experts_of(world), Profile(weights=WEIGHTS), MergeOptions(on=on)).write(tmp_path / "soup")
    out = merge_into_base(ExpertLibrary.open(soup), Profile(weights={"soup": 1.0}), world.base, tmp_path / "model")
    check_models(world, read(out), dict(world.soup({"e0": 1.0, **WEIGHTS})))
    assert verify(soup).is_sound


def test_a_dense_method_leaves_the_adapter_alone(world: World, tmp_path: Path) -> None:
    """The model is the one without the adapter, plus what PEFT's merge of the adapter adds to the base."""
    on, profile = world.experts["e0"].folder, Profile(weights=WEIGHTS, method="ties")
    got = merge_into_base(experts_of(world), profile, world.base, tmp_path / "on", MergeOptions(on=on))
    alone = read(merge_into_base(experts_of(world), profile, world.base, tmp_path / "alone"))
    steps = {
        name: world.experts["e0"].merged[name].double() - tensor.double() for name, tensor in world.tensors.items()
    }
    check_models(world, read(got), {name: tensor.double() + steps[name] for name, tensor in alone.items()})
    assert verify(got).is_sound
