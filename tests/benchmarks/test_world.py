"""The synthetic world: as described, without zeros, and written again only if the description changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors import safe_open

from benchmarks.shapes import NUM_EXPERTS, RANK, SHAPES
from benchmarks.world import Kind, Part, World, check_space

TINY = SHAPES["tiny"]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Return a world with the smallest base and both kinds of its experts."""
    made = World(tmp_path_factory.mktemp("world"))
    kinds: tuple[Kind, ...] = ("base", "free", "shared")
    for kind in kinds:
        made.build(Part(TINY, kind))
    return made


def test_transformers_loads_the_base_with_every_tensor(world: World) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(world.base(TINY), output_loading_info=True)
    model, output = loaded
    assert not output["missing_keys"]
    assert not output["unexpected_keys"]
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert sum(value.numel() for value in values.values()) * 2 == TINY.base_bytes
    for value in values.values():
        # of the least tensor, 64 values, the standard deviation is off by 1 / sqrt(128) = 9%: this is five times that
        assert value.float().std() == pytest.approx(0.02, rel=0.45)
        assert torch.all(value != 0)
        if value.dim() == 2:  # rows that repeat others would be a degenerate matrix
            assert len(np.unique(value.float().numpy(), axis=0)) == len(value)


def test_experts_are_free_or_share_their_basis(world: World) -> None:
    kinds: tuple[Literal["free", "shared"], ...] = ("free", "shared")
    for basis in kinds:
        files: list[Any] = [
            safe_open(folder / "adapter_model.safetensors", framework="numpy")
            for folder in sorted(world.experts(TINY, basis).glob("e*"))
        ]
        assert len(files) == NUM_EXPERTS
        names = list(files[0].keys())
        assert len(names) == 2 * 7 * TINY.layers
        for name in names:
            tensors = [file.get_tensor(name) for file in files]
            assert {tensor.dtype for tensor in tensors} == {np.dtype(np.float32)}
            assert RANK in tensors[0].shape
            is_equal = all(np.array_equal(tensors[0], other) for other in tensors[1:])
            assert is_equal == (basis == "shared" and "lora_A" in name)
            assert all(np.all(tensor != 0) for tensor in tensors)
        size = (world.experts(TINY, basis) / "e0" / "adapter_model.safetensors").stat().st_size
        assert TINY.expert_bytes < size < TINY.expert_bytes + 16384  # the header


def test_a_part_is_made_anew_only_where_its_settings_are_others(world: World) -> None:
    part = Part(TINY, "free")
    assert world.missing([part]) == []
    settings = world.experts(TINY) / "settings.json"
    settings.write_text(json.dumps({**part.settings, "seed": 1}), encoding="utf-8")
    assert world.missing([part, part]) == [part]
    settings.unlink()
    assert world.missing([part]) == [part]
    world.build(part)
    assert world.missing([part]) == []


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tmp_path: Path) -> None:
    world = World(tmp_path / "world")
    needed, free = check_space(world, [Part(TINY, "free")], 1000)
    assert needed == TINY.expert_bytes * NUM_EXPERTS + 1000
    assert free > needed
    with pytest.raises(SystemExit, match="PSOUPS_BENCH_DIR"):
        check_space(world, [], 1 << 60)
    assert list(world.folder.iterdir()) == []


def test_real_shapes_have_the_sizes_that_are_told() -> None:
    assert SHAPES["1b"].base_bytes == pytest.approx(2.1e9, rel=0.02)
    assert SHAPES["8b"].expert_bytes * 6 == pytest.approx(1.0e9, rel=0.02)
    # four times the layers; the embeddings stay
    assert SHAPES["1b-deep"].layers == 4 * SHAPES["1b"].layers
