"""Names in adapter files, with what training tools leave in them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch._dynamo.eval_frame import OptimizedModule
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import _common_utils

from personalized_soups import ExpertLibrary, Profile, merge
from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.names import WRAPPERS, core_name, parse_name
from personalized_soups.errors import FileFormatError, SoupError, UnsupportedAdapterError
from tests import oracles
from tests.experts import write_adapter

PREFIX = "base_model.model."
WEIGHTS_FILE = "adapter_model.safetensors"
LAYER = "model.layers.0.self_attn"
# Every kind of tensor that PEFT saves.
PLAIN = (
    f"{PREFIX}{LAYER}.q_proj.lora_A.weight",
    f"{PREFIX}{LAYER}.q_proj.lora_B.weight",
    f"{PREFIX}{LAYER}.q_proj.lora_B.bias",
    f"{PREFIX}{LAYER}.q_proj.lora_magnitude_vector",
    f"{PREFIX}model.embed_tokens.lora_embedding_A",
    f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta",
    f"{PREFIX}model.layers.0.mlp.experts.base_layer.lora_A.weight",
    f"{PREFIX}{LAYER}.q_proj.base_layer.bias",
    f"{PREFIX}score.weight",
)


@pytest.mark.parametrize("wrapper", sorted(WRAPPERS))
@pytest.mark.parametrize("tensor", PLAIN)
def test_wrappers_are_left_out_wherever_they_are(tensor: str, wrapper: str) -> None:
    steps = tensor.split(".")
    plain = parse_name(tensor, where="x")
    for place in range(len(steps)):
        for count in (1, 2):
            wrapped = ".".join([*steps[:place], *[wrapper] * count, *steps[place:]])
            assert parse_name(wrapped, where="x") == plain, wrapped


@pytest.mark.parametrize("wrapper", ["module", "_module"])
def test_an_ordinary_name_is_left_out_only_outside_of_the_base(wrapper: str) -> None:
    """PEFT's model holds its tuner, and the tuner the base: outside of the base no module is called `module`."""
    plain = parse_name(PLAIN[0], where="x")
    inner = PLAIN[0].removeprefix(PREFIX)
    for outside in (
        f"{wrapper}.{PREFIX}",
        f"{wrapper}.{wrapper}.{PREFIX}",
        f"base_model.{wrapper}.model.",
        f"_orig_mod.{wrapper}.{PREFIX}",
        f"{wrapper}._fsdp_wrapped_module.{PREFIX}",
    ):
        assert parse_name(outside + inner, where="x") == plain
    for start, module in (("", f"{wrapper}.{LAYER}"), ("model.", f"{wrapper}.layers.0.self_attn")):
        assert parse_name(f"{PREFIX}{start}{module}.q_proj.lora_A.weight", where="x").path == f"{start}{module}.q_proj"


@pytest.mark.parametrize(
    "tensor",
    [
        "model.layers.0.q_proj.lora_A.weight",  # no PEFT prefix at all
        f"wrapped.{PREFIX}q_proj.lora_A.weight",  # no wrapper that is known
        "base_model.inner.model.q_proj.lora_A.weight",
        f"{PREFIX}{LAYER}.q_proj.lora_A.default.weight",  # a state dict that PEFT did not save
        f"{PREFIX}module..q_proj.lora_A.weight",
    ],
)
def test_other_names_are_refused_as_before(tensor: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match="is neither a LoRA factor"):
        parse_name(tensor, where="x")


def test_the_wrappers_are_those_of_torch() -> None:
    assert checkpoint_wrapper._CHECKPOINT_WRAPPED_MODULE in WRAPPERS
    assert _common_utils.FSDP_WRAPPED_MODULE in WRAPPERS
    assert OptimizedModule._opt_mod_attributes >= {"_orig_mod"}


@pytest.mark.parametrize(
    ("name", "core"),
    [
        ("model.language_model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("language_model.model.layers.0.mlp.up_proj", "layers.0.mlp.up_proj"),
        ("transformer.h.0.attn.c_attn", "h.0.attn.c_attn"),
        ("module.model._orig_mod.layers.0.module.up_proj", "layers.0.up_proj"),
        ("model.visual.blocks.0.attn.qkv", "visual.blocks.0.attn.qkv"),
        ("vision_model.encoder.layers.0.fc1", "vision_model.encoder.layers.0.fc1"),
        ("lm_q.layers.0.q_proj", "lm_q.layers.0.q_proj"),
        ("layers.0.model.q_proj", "layers.0.model.q_proj"),
        ("model", "model"),
    ],
)
def test_a_core_is_without_wrappers_and_the_ways_to_the_model_proper(name: str, core: str) -> None:
    assert core_name(name) == core


def write(folder: Path, start: str, *, seed: int = 0, **config: Any) -> Path:
    random = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Any]] = {
        f"{start}{LAYER}.{name}.lora_{factor}.weight": ("F32", random.normal(size=shape))
        for name in ("q_proj", "v_proj")
        for factor, shape in (("A", (2, 6)), ("B", (5, 2)))
    }
    return write_adapter(folder, tensors, rank=2, **{"target_modules": ["q_proj", "v_proj"], **config})


@pytest.mark.parametrize(
    ("start", "config"),
    [
        ("_orig_mod.base_model.model.", {}),
        ("module.base_model.model.", {}),
        (
            "base_model.model._orig_mod.",
            {"target_modules": [f"_orig_mod.{LAYER}.{name}" for name in ("q_proj", "v_proj")]},
        ),
        ("base_model.model._fsdp_wrapped_module._checkpoint_wrapped_module.", {"target_modules": r".*\.[qv]_proj"}),
    ],
)
def test_a_soup_of_an_expert_with_wrappers_and_one_without_is_that_of_two_without(
    tmp_path: Path, start: str, config: dict[str, Any]
) -> None:
    merged = []
    for name, own, fields in (("plain", PREFIX, {}), ("wrapped", start, config)):
        write(tmp_path / name / "one", PREFIX, seed=1)
        write(tmp_path / name / "two", own, seed=2, **fields)
        library = ExpertLibrary.open(tmp_path / name)
        out = tmp_path / f"{name}-out"
        merge(library, Profile(weights={"one": 0.5, "two": -2.0})).write(out)
        merged.append((out / WEIGHTS_FILE).read_bytes())
        assert LoraAdapter.open(out).modules.keys() == {f"{LAYER}.q_proj", f"{LAYER}.v_proj"}
    assert merged[0] == merged[1]


def test_one_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path / "one", PREFIX)
    tensors = oracles.read_tensors(folder / WEIGHTS_FILE)
    twice = {**tensors, **{name.replace("model.layers", "model._orig_mod.layers"): tensors[name] for name in tensors}}
    oracles.write_tensors(folder / WEIGHTS_FILE, {name: ("F32", value) for name, value in twice.items()}, {})
    with pytest.raises(FileFormatError, match=r"_orig_mod\S+ are the same tensor"):
        LoraAdapter.open(folder)


@pytest.mark.parametrize(
    ("alpha_pattern", "alpha"),
    [
        ({"q_proj": 3}, 3),
        ({f"{LAYER}.q_proj": 3}, 3),
        ({f"_orig_mod.{LAYER}.q_proj": 3}, 3),  # the name in training
        ({f"^_orig_mod.{LAYER}.q_proj": 3}, 3),
        ({r".*_orig_mod\.model\.layers\.\d+\.self_attn\.q_proj": 3}, 3),
        ({"v_proj": 3}, 8),
        ({f"^{LAYER}.q_proj": 3}, None),  # nothing says whether the wrapper was there when PEFT looked
    ],
)
def test_patterns_count_by_the_names_in_training(
    tmp_path: Path, alpha_pattern: dict[str, int], alpha: int | None
) -> None:
    folder = write(tmp_path / "one", "base_model.model._orig_mod.", alpha=8, alpha_pattern=alpha_pattern)
    if alpha is None:
        with pytest.raises(SoupError, match="alpha_pattern give different values for _orig_mod"):
            LoraAdapter.open(folder)
    else:
        assert LoraAdapter.open(folder).modules[f"{LAYER}.q_proj"].scaling == alpha / 2
