"""Base + adapter in memory equals W + s B A in float64, PEFT's merge_and_unload, and a merge into the base's files."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import ExpertLibrary, Generator, Profile, merge_into_base
from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.errors import IncompatibleExpertsError, UnsupportedAdapterError, UsageError
from personalized_soups.generation.added_adapter import add_adapter
from personalized_soups.generation.loading import load_base
from tests import oracles
from tests.base_adapters import SFT_SHAPES, bounds, float64_weights, trained_on, write_merged_base, write_sft
from tests.experts import SHAPES, write_adapter, write_expert

CPU = torch.device("cpu")
UP = SHAPES["model.layers.0.mlp.up_proj"]

# PEFT still asks transformers by the old name; nothing of ours to change
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    return write_sft(tmp_path / "sft")


def weights_of(model: Any) -> dict[str, Any]:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


def test_the_weights_are_w_plus_s_b_a(small_base: Path, sft: Path) -> None:
    got = weights_of(load_base(small_base, device=CPU, on=BaseAdapter.open(sft)))
    want = float64_weights(small_base, [sft], [1.0])
    room = bounds(small_base, [sft], [1.0], num_ranks=3)
    assert want.keys() == SFT_SHAPES.keys()
    for module, matrix in want.items():
        # one rounding more than the bound of the sum: the model is rounded to float32
        assert (np.abs(got[f"{module}.weight"] - matrix) <= room[module] + 2.0**-24 * np.abs(matrix)).all(), module
    bare = oracles.read_tensors(small_base / "model.safetensors")
    for name in bare.keys() - {f"{module}.weight" for module in want}:
        assert np.array_equal(got[name], bare[name]), name


def test_the_logits_are_those_of_pefts_merged_model(small_base: Path, sft: Path, tmp_path: Path) -> None:
    ids_BT = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        got = Generator.open(small_base, on=sft, device="cpu").model(input_ids=ids_BT).logits
        merged = Generator.open(write_merged_base(small_base, sft, tmp_path / "merged"), device="cpu")
        want = merged.model(input_ids=ids_BT).logits
        bare = Generator.open(small_base, device="cpu").model(input_ids=ids_BT).logits
    # the weights differ by at most some 2^-22 of their size, and the logits' other operations by as much again
    assert oracles.relative_error(got.double().numpy(), want.double().numpy()) < 1e-5
    assert oracles.relative_error(got.double().numpy(), bare.double().numpy()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_are_to_the_bit_those_of_a_merge_into_the_base(
    small_base: Path, sft: Path, tmp_path: Path, dtype: torch.dtype
) -> None:
    base = tmp_path / "base"
    shutil.copytree(small_base, base)
    if dtype == torch.bfloat16:
        load_base(small_base, device=CPU, dtype="bfloat16").save_pretrained(base)
    library = ExpertLibrary.open(sft)
    merge_into_base(library, Profile(weights={"sft": 1.0}), base, tmp_path / "merged")
    got = load_base(base, device=CPU, dtype="auto", on=BaseAdapter.open(sft)).state_dict()
    want = load_base(tmp_path / "merged", device=CPU, dtype="auto").state_dict()
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        assert tensor.dtype == dtype
        assert torch.equal(got[name], tensor), name


def test_an_adapter_on_top_is_added_to_base_and_adapter(small_base: Path, sft: Path, tmp_path: Path) -> None:
    expert = trained_on(write_expert(tmp_path / "warm", seed=3), sft)
    got = weights_of(Generator.open(small_base, expert, on=sft, device="cpu").model)
    for module, matrix in float64_weights(small_base, [sft, expert], [1.0, 1.0]).items():
        assert oracles.relative_error(got[f"{module}.weight"], matrix) < 1e-6, module


def test_the_digest_covers_the_delta_alone(sft: Path, tmp_path: Path) -> None:
    digest = BaseAdapter.open(sft).digest
    same = write_sft(tmp_path / "other_name", base="another/base", lora_dropout=0.5)
    assert BaseAdapter.open(same).digest == digest
    for name, other in {
        "values": write_sft(tmp_path / "values", seed=91),
        "alpha": write_sft(tmp_path / "alpha", alpha=6),
        "scaling": write_sft(tmp_path / "scaling", use_rslora=False),
    }.items():
        assert BaseAdapter.open(other).digest != digest, name


def test_an_adapter_of_another_shape_or_name_is_rejected(small_base: Path, tmp_path: Path) -> None:
    wide = write_expert(tmp_path / "wide", shapes={"model.layers.0.self_attn.q_proj": (64, 32)})
    with pytest.raises(IncompatibleExpertsError, match=r"q_proj.*\[64, 64\].*\[64, 32\]") as caught:
        Generator.open(small_base, on=wide, device="cpu")
    assert caught.value.where == str(wide)
    deep = write_expert(tmp_path / "deep", shapes={"model.layers.7.self_attn.q_proj": (64, 64)})
    with pytest.raises(IncompatibleExpertsError, match=r"layers\.7\.self_attn\.q_proj\.weight is not in the base"):
        Generator.open(small_base, on=deep, device="cpu")


def test_an_adapter_that_records_another_base_is_rejected(small_base: Path, sft: Path) -> None:
    trained_on(sft, None, base={"name": "elsewhere", "fingerprint": "ab" * 32})
    with pytest.raises(IncompatibleExpertsError, match=r"trained on elsewhere \(fingerprint abababababab\)"):
        Generator.open(small_base, on=sft, device="cpu")
    Generator.open(small_base, on=sft, device="cpu", same_base=True)
    trained_on(sft, None, base={"name": "here", "fingerprint": base_fingerprint(small_base)})
    Generator.open(small_base, on=sft, device="cpu")


@pytest.mark.parametrize(
    ("extra", "config", "names"),
    [
        ("model.norm.weight", {"modules_to_save": ["norm"]}, "modules_to_save"),
        ("model.layers.0.mlp.up_proj.lora_magnitude_vector", {"use_dora": True}, "use_dora"),
        ("model.layers.0.mlp.up_proj.lora_B.bias", {"lora_bias": True}, "lora_bias"),
    ],
)
def test_an_adapter_with_more_than_factors_is_rejected_by_name(
    small_base: Path, tmp_path: Path, extra: str, config: dict[str, Any], names: str
) -> None:
    module = "model.layers.0.mlp.up_proj"
    tensors = {
        f"base_model.model.{module}.lora_A.weight": ("F32", np.ones((2, 64))),
        f"base_model.model.{module}.lora_B.weight": ("F32", np.ones((96, 2))),
        f"base_model.model.{extra}": ("F32", np.ones(64 if "norm" in extra else 96)),
    }
    folder = write_adapter(tmp_path / "sft", tensors, rank=2, shapes={module: (96, 64)}, **config)
    with pytest.raises(UnsupportedAdapterError, match=names) as caught:
        Generator.open(small_base, on=folder, device="cpu")
    assert "merge this adapter into the base first" in caught.value.mend


def test_an_adapter_of_a_tied_embedding_is_rejected(small_base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    base = tmp_path / "tied"
    shutil.copytree(small_base, base)
    config = json.loads((base / "config.json").read_text())
    LlamaForCausalLM(LlamaConfig.from_dict({**config, "tie_word_embeddings": True})).save_pretrained(base)
    head = write_expert(tmp_path / "head", shapes={"lm_head": (config["vocab_size"], 64)})
    with pytest.raises(UnsupportedAdapterError, match=r"lm_head\.weight, which is the input and the output embedding"):
        Generator.open(base, on=head, device="cpu")
    # the output embedding of a base with two embeddings is a layer like any other
    got = weights_of(Generator.open(small_base, on=head, device="cpu").model)["lm_head.weight"]
    assert oracles.relative_error(got, float64_weights(small_base, [head], [1.0])["lm_head"]) < 1e-6


def test_an_adapter_that_needs_an_adapter_is_rejected(small_base: Path, sft: Path, tmp_path: Path) -> None:
    expert = trained_on(write_expert(tmp_path / "warm"), sft)
    with pytest.raises(IncompatibleExpertsError, match="itself trained on top of an adapter, sft") as caught:
        Generator.open(small_base, on=expert, device="cpu")
    assert "merge warm with weight 1 on top of sft" in caught.value.mend


def test_an_expert_needs_its_own_adapter(small_base: Path, sft: Path, tmp_path: Path) -> None:
    expert = trained_on(write_expert(tmp_path / "warm"), sft)
    with pytest.raises(IncompatibleExpertsError, match="no adapter is given: warm: on top of sft") as caught:
        Generator.open(small_base, expert, device="cpu")
    assert caught.value.mend == "give the folder of this adapter: on=sft"
    other = write_sft(tmp_path / "other", seed=5)
    with pytest.raises(IncompatibleExpertsError, match=r"not trained on top of the adapter that is given \(other"):
        Generator.open(small_base, expert, on=other, device="cpu")
    plain = trained_on(write_expert(tmp_path / "plain"), None)
    with pytest.raises(IncompatibleExpertsError, match="plain: without an adapter") as caught:
        Generator.open(small_base, plain, on=sft, device="cpu")
    assert caught.value.mend == "leave out on=sft"


def test_sums_beyond_the_dtype_are_rejected(small_base: Path, tmp_path: Path) -> None:
    huge = write_expert(tmp_path / "huge", alpha=1e8, shapes={"model.layers.0.mlp.up_proj": UP})
    with pytest.raises(UsageError, match="do not fit into float16"):
        load_base(small_base, device=CPU, dtype="float16", on=BaseAdapter.open(huge))
    load_base(small_base, device=CPU, on=BaseAdapter.open(huge))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_a_quantised_weight_is_rejected(small_base: Path, sft: Path, dtype: torch.dtype) -> None:
    model: Any = load_base(small_base, device=CPU)
    layer = model.model.layers[1].self_attn.o_proj
    layer.weight = torch.nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
    before = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(UnsupportedAdapterError, match=r"o_proj\.weight is quantised"):
        add_adapter(model, BaseAdapter.open(sft))
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, before)  # nothing was added


def test_an_offloaded_weight_is_rejected(small_base: Path, sft: Path) -> None:
    model: Any = load_base(small_base, device=CPU)
    model.model.layers[1].self_attn.o_proj.to("meta")
    with pytest.raises(UnsupportedAdapterError, match=r"o_proj\.weight is offloaded"):
        add_adapter(model, BaseAdapter.open(sft))


class Layers(torch.nn.Module):
    """One layer of each kind: Conv1D stores [in, out], an embedding's A has its vocabulary, a parameter has experts."""

    def __init__(self) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        random = torch.Generator().manual_seed(0)
        self.turned = Conv1D(6, 4)
        self.embed = torch.nn.Embedding(7, 5)
        self.conv = torch.nn.Conv2d(3, 4, 2)
        self.mixture = torch.nn.Module()
        self.mixture.up = torch.nn.Parameter(torch.randn(3, 8, 5, generator=random))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embed

    def get_output_embeddings(self) -> None:
        return None


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        ({"target_modules": ["turned", "embed", "conv"], "fan_in_fan_out": True}, {"turned", "embed", "conv"}),
        ({"target_modules": ["conv"], "target_parameters": ["mixture.up"]}, {"conv", "mixture"}),
    ],
)
def test_layers_of_every_kind_get_pefts_delta(tmp_path: Path, options: dict[str, Any], changed: set[str]) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = Layers()
    config = LoraConfig(r=2, lora_alpha=6, init_lora_weights=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = get_peft_model(copy.deepcopy(model), config)
        wrapped.save_pretrained(str(tmp_path / "sft"), save_embedding_layers=False)
        want = wrapped.merge_and_unload().state_dict()
    before = copy.deepcopy(model.state_dict())
    add_adapter(model, BaseAdapter.open(tmp_path / "sft"))
    for name, tensor in model.state_dict().items():
        # W plus two products of numbers below 8: two sums of 3 terms, each rounded to float32
        assert torch.allclose(tensor, want[name], rtol=0, atol=2 * 3 * 2.0**-24 * 64), name
        is_changed = name.partition(".")[0] in changed and not name.endswith("bias")
        assert torch.equal(tensor, before[name]) != is_changed, name
