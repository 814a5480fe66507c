"""DoRA, lora_bias and quantised layers in a mixed batch; what cannot be mixed is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from personalized_soups import ExpertLibrary, SoupModel
from personalized_soups.errors import IncompatibleExpertsError, InputError, UnsupportedAdapterError
from personalized_soups.mixing.layers.experts import check_experts
from personalized_soups.mixing.layers.gates import Gates
from tests import oracles
from tests.experts import SHAPES, write_adapter, write_expert
from tests.mixing.worlds import LOGITS, float64_model, open_model, random_ids, relative
from tests.oracles import Matrix

ROWS: list[dict[str, float] | None] = [
    {"dora": 0.8},
    None,
    {"dora": -0.3, "plain": 0.9},
    {"plain": 0.5, "other": 0.4, "dora": 1.2},
]


def _write_dora(folder: Path, base: Path, seed: int, *, shapes: Any = SHAPES, turned: bool = False) -> Path:
    """Write a DoRA expert whose magnitudes are near the norms of the base's rows, as training leaves them."""
    random = np.random.default_rng(seed)
    weights = oracles.read_tensors(base / "model.safetensors")
    tensors: dict[str, tuple[str, Any]] = {}
    for module, (out_features, in_features) in shapes.items():
        name = f"base_model.model.{module}"
        weight = weights[f"{module}.weight"]
        norms = np.linalg.norm(weight.T if turned else weight, axis=1)
        tensors[f"{name}.lora_A.weight"] = ("F32", random.normal(size=(3, in_features)) / 8)
        tensors[f"{name}.lora_B.weight"] = ("F32", random.normal(size=(out_features, 3)) / 8)
        tensors[f"{name}.lora_magnitude_vector"] = ("F32", norms * random.uniform(0.7, 1.4, size=out_features))
    return write_adapter(folder, tensors, rank=3, alpha=6, shapes=shapes, use_dora=True, fan_in_fan_out=turned)


def _changed(folder: Path, module: str, weight: Matrix) -> Matrix:
    """Return what one expert makes of a layer's weight, minus that weight: DoRA's own formula, in float64."""
    delta = oracles.deltas(folder)[module]
    tensors = oracles.read_tensors(folder / "adapter_model.safetensors")
    magnitude = tensors.get(f"base_model.model.{module}.lora_magnitude_vector")
    if magnitude is None:
        return delta
    whole: Matrix = weight + delta
    scaled: Matrix = (magnitude / np.linalg.norm(whole, axis=1))[:, None] * whole - weight
    return scaled


def _true(base: Path, folders: dict[str, Path], weights: dict[str, float] | None, ids: Tensor, turned: bool) -> Tensor:
    model = float64_model(base)
    for module, layer in model.named_modules():
        if module not in oracles.deltas(next(iter(folders.values()))):
            continue
        own = layer.weight.detach().numpy()
        own = own.T.copy() if turned else own.copy()
        change = sum((weight * _changed(folders[name], module, own) for name, weight in (weights or {}).items()), 0.0)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy((own + change).T if turned else own + change))
    with torch.no_grad():
        result: Tensor = model(input_ids=ids[None]).logits[0]
    return result


def test_dora_scales_each_rows_base_by_its_own_soup(tmp_path: Path, small_base: Path) -> None:
    folders = {
        "dora": _write_dora(tmp_path / "experts" / "dora", small_base, 1),
        "other": _write_dora(tmp_path / "experts" / "other", small_base, 2),
        "plain": write_expert(tmp_path / "experts" / "plain", seed=3),
    }
    model = open_model(small_base, tmp_path / "experts")
    ids_BT = random_ids(4, 7)
    with model.mixture(ROWS), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, weights in enumerate(ROWS):
        assert relative(got[row], _true(small_base, folders, weights, ids_BT[row], turned=False)) < LOGITS


def test_dora_leaves_a_bias_unscaled(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=1, n_head=2))
    nn.init.normal_(model.transformer.h[0].attn.c_attn.bias)
    model.save_pretrained(tmp_path / "base")
    shapes = {"transformer.h.0.attn.c_attn": (96, 32)}
    dora = _write_dora(tmp_path / "experts" / "dora", tmp_path / "base", 1, shapes=shapes, turned=True)
    mixed = SoupModel(GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval(), tmp_path / "experts")
    ids_BT = random_ids(2, 7)
    rows: list[dict[str, float] | None] = [{"dora": 0.8}, {"dora": -0.5}]
    with mixed.mixture(rows), torch.no_grad():
        got = mixed(input_ids=ids_BT).logits
    for row, weights in enumerate(rows):
        want = _true(tmp_path / "base", {"dora": dora}, weights, ids_BT[row], turned=True)
        assert relative(got[row], want) < LOGITS


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*has no bias. This means that merging:UserWarning")
def test_lora_bias_is_added_where_the_base_has_none_as_peft_does(tmp_path: Path, small_base: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    random = np.random.default_rng(0)
    for place, name in enumerate(("plain", "warm")):
        tensors: dict[str, tuple[str, Any]] = {}
        for module, (out_features, in_features) in SHAPES.items():
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = ("F32", random.normal(size=(4, in_features)) / 8)
            tensors[f"{prefix}.lora_B.weight"] = ("F32", random.normal(size=(out_features, 4)) / 8)
            if place:
                tensors[f"{prefix}.lora_B.bias"] = ("F32", random.normal(size=out_features))
        write_adapter(tmp_path / "experts" / name, tensors, lora_bias=bool(place))
    model = open_model(small_base, tmp_path / "experts")
    ids_BT = random_ids(3, 6)
    with model.mixture([{"warm": 1.0}, None, {"plain": 1.0}]), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, name in ((0, "warm"), (2, "plain")):
        bare = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float64).eval()
        peft = PeftModel.from_pretrained(bare, tmp_path / "experts" / name, autocast_adapter_dtype=False).double()
        with torch.no_grad():
            assert relative(got[row], peft(input_ids=ids_BT[row : row + 1]).logits[0]) < LOGITS
    with model.mixture([{"warm": 1.0}, {"warm": 0.5}, None]), torch.no_grad():
        assert not torch.equal(model(input_ids=ids_BT).logits, got)


class _Eight(nn.Module):
    """A linear layer whose weight is held in eight bits: a quantised layer, as libraries make them."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scale = layer.weight.detach().abs().amax() / 127
        self.scale = nn.Buffer(scale)
        self.weight = nn.Parameter((layer.weight.detach() / scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def _quantised(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for module in SHAPES:
        parent, _, leaf = module.rpartition(".")
        setattr(model.get_submodule(parent), leaf, _Eight(model.get_submodule(module)))
    return model


def test_a_quantised_layer_is_touched_at_its_outputs_only(tmp_path: Path, small_base: Path) -> None:
    folder = write_expert(tmp_path / "experts" / "warm", seed=1)
    model = SoupModel(_quantised(small_base), tmp_path / "experts")
    ids_BT = random_ids(2, 6)
    with model.mixture([{"warm": 0.7}, None]), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    wide = _quantised(small_base).double()
    deltas = oracles.deltas(folder)
    for module in SHAPES:
        layer: Any = wide.get_submodule(module)
        dense = nn.Linear(layer.in_features, layer.out_features, bias=False, dtype=torch.float64)
        held = layer.weight.double() * layer.scale.double()
        dense.weight.data = held + 0.7 * torch.from_numpy(deltas[module])
        parent, _, leaf = module.rpartition(".")
        setattr(wide.get_submodule(parent), leaf, dense)
    with torch.no_grad():
        assert relative(got[0], wide(input_ids=ids_BT[:1]).logits[0]) < LOGITS
        assert relative(got[1], _quantised(small_base)(input_ids=ids_BT[1:]).logits[0]) < LOGITS


def test_dora_on_a_quantised_layer_is_refused(tmp_path: Path, small_base: Path) -> None:
    _write_dora(tmp_path / "experts" / "dora", small_base, 1)
    with pytest.raises(UnsupportedAdapterError, match="quantized") as caught:
        SoupModel(_quantised(small_base), tmp_path / "experts")
    assert "dora" in caught.value.where


@pytest.mark.parametrize(
    ("tensors", "config", "problem"),
    [
        ({"model.embed_tokens": ("embedding", (320, 64))}, {"target_modules": ["embed_tokens"]}, "embedding"),
        ({}, {"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_what_is_no_change_of_a_linear_layer_is_refused_by_name(
    tmp_path: Path, small_base: Path, tensors: Any, config: Any, problem: str
) -> None:
    held: dict[str, tuple[str, Any]] = {}
    for module, (_, (rows, width)) in tensors.items():
        held[f"base_model.model.{module}.lora_embedding_A"] = ("F32", np.ones((4, rows)))
        held[f"base_model.model.{module}.lora_embedding_B"] = ("F32", np.ones((width, 4)))
    if not tensors:
        held["base_model.model.lm_head.weight"] = ("F32", np.ones((320, 64)))
        for module, (out_features, in_features) in SHAPES.items():
            held[f"base_model.model.{module}.lora_A.weight"] = ("F32", np.ones((4, in_features)))
            held[f"base_model.model.{module}.lora_B.weight"] = ("F32", np.ones((out_features, 4)))
    write_adapter(tmp_path / "experts" / "odd", held, **config)
    with pytest.raises(UnsupportedAdapterError, match=problem) as caught:
        open_model(small_base, tmp_path / "experts")
    assert "odd" in caught.value.what
    assert "merge" in caught.value.mend


def test_an_expert_of_other_shapes_does_not_fit(tmp_path: Path, small_base: Path) -> None:
    write_expert(tmp_path / "experts" / "far", shapes={"model.layers.0.self_attn.q_proj": (64, 32)})
    write_expert(tmp_path / "others" / "far", shapes={"model.layers.9.self_attn.q_proj": (64, 64)})
    with pytest.raises(
        IncompatibleExpertsError, match=r"q_proj has shape \[64, 64\], but the expert adapts a layer of \[64, 32\]"
    ):
        open_model(small_base, tmp_path / "experts")
    with pytest.raises(IncompatibleExpertsError, match=r"the model has no layer model\.layers\.9\.self_attn\.q_proj"):
        open_model(small_base, tmp_path / "others")


def test_a_name_that_the_model_does_not_have_is_shown_with_the_models(tmp_path: Path, small_base: Path) -> None:
    apart = "model.language_model.layers.0.self_attn.q_proj"
    write_expert(tmp_path / "experts" / "far", shapes={apart: (64, 64)})
    with pytest.raises(IncompatibleExpertsError) as caught:
        open_model(small_base, tmp_path / "experts")
    assert f"the model has no layer {apart} (did you mean 'model.layers.0.self_attn.q_proj'?)" in caught.value.what


def test_two_modules_of_an_expert_on_one_layer_are_refused(tmp_path: Path) -> None:
    """PEFT wraps a layer that a model has under two names once."""
    layer = nn.Linear(8, 8)
    model = nn.ModuleDict({"one": layer, "two": layer})
    write_expert(tmp_path / "experts" / "far", shapes={"one": (8, 8), "two": (8, 8)})
    experts = list(ExpertLibrary.open(tmp_path / "experts").values())
    with pytest.raises(IncompatibleExpertsError, match="one and two are two names of one layer"):
        check_experts(experts, model, Gates(), same_base=True)


def test_an_expert_that_records_another_base_is_refused(tmp_path: Path, small_base: Path) -> None:
    folder = write_expert(tmp_path / "experts" / "far")
    (folder / "expert.json").write_text(json.dumps({"side": "far", "base": {"name": "b", "fingerprint": "ab" * 32}}))
    with pytest.raises(IncompatibleExpertsError, match="far was trained on"):
        open_model(small_base, tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", same_base=True)
    assert list(model.experts) == ["far"]
    # The base is fingerprinted as soon as an expert is added that records one.
    write_expert(tmp_path / "fine" / "near")
    known = open_model(small_base, tmp_path / "fine")
    with pytest.raises(IncompatibleExpertsError, match="far was trained on"):
        known.experts.add(folder)
    assert list(known.experts) == ["near"]


def test_a_nan_in_an_expert_is_reported_with_file_and_tensor(tmp_path: Path, small_base: Path) -> None:
    tensors: dict[str, tuple[str, Any]] = {
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": ("F32", np.full((4, 64), np.nan)),
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight": ("F32", np.ones((64, 4))),
    }
    write_adapter(tmp_path / "experts" / "ill", tensors)
    write_expert(tmp_path / "good" / "fine")
    model = open_model(small_base, tmp_path / "good")
    with pytest.raises(InputError, match=r"lora_A.*nan"):
        model.experts.add(tmp_path / "experts" / "ill")
    assert list(ExpertLibrary.open(tmp_path / "experts")) == ["ill"]
    assert list(model.experts) == ["fine"]
