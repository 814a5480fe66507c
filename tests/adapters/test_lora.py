from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.names import split_name
from personalized_soups.errors import FileFormatError, InputError, UnsupportedAdapterError
from tests import oracles
from tests.experts import SHAPES, write_config, write_expert

PREFIX = "base_model.model.m.q_proj"


def write_adapter(folder: Path, tensors: dict[str, tuple[str, Any]], **config: Any) -> Path:
    write_config(folder, shapes={"m.q_proj": (3, 5)}, **config)
    oracles.write_tensors(folder / "adapter_model.safetensors", tensors)
    return folder


def pair(a: Any = (4, 5), b: Any = (3, 4), dtype: str = "F32") -> dict[str, tuple[str, Any]]:
    return {f"{PREFIX}.lora_A.weight": (dtype, np.ones(a)), f"{PREFIX}.lora_B.weight": (dtype, np.ones(b))}


def test_factors_are_what_the_file_holds(tmp_path: Path) -> None:
    adapter = LoraAdapter.open(write_expert(tmp_path / "a", dtype="BF16"))
    truth = oracles.factors(oracles.read_tensors(tmp_path / "a" / "adapter_model.safetensors"))
    assert adapter.modules.keys() == SHAPES.keys()
    for name, (a, b) in truth.items():
        factors = adapter.factors(name)
        assert factors.a_RI.dtype == torch.float32
        np.testing.assert_array_equal(factors.a_RI.double().numpy(), a)
        np.testing.assert_array_equal(factors.b_OR.double().numpy(), b)
        assert factors.scaling == 2
        assert (adapter.modules[name].out_features, adapter.modules[name].in_features) == SHAPES[name]


VARIANTS = {
    "base_model.model.m.q_proj.lora_magnitude_vector": "DoRA",
    "base_model.model.m.q_proj.lora_magnitude_vector.weight": "DoRA",
    "base_model.model.m.embed.lora_embedding_A": "an embedding",
    "base_model.model.m.q_proj.lora_B.bias": "lora_bias",
    "base_model.model.score.modules_to_save.weight": "modules_to_save",
    "base_model.model.m.embed.token_adapter.trainable_tokens_delta": "trainable_token_indices",
    "base_model.model.m.q_proj.base_layer.bias": "bias",
    "base_model.model.lm_head.weight": "not the name of a LoRA factor",
    "m.q_proj.lora_A.weight": "not the name of a LoRA factor",
    "base_model.model.m.experts.base_layer.lora_A.weight": "not the name of a LoRA factor",
    "base_model.model.lora_A.weight": "not the name of a LoRA factor",
}


@pytest.mark.parametrize("name", VARIANTS)
def test_tensors_of_other_variants_are_refused_by_name(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path, {**pair(), name: ("F32", np.ones(3))})
    with pytest.raises(UnsupportedAdapterError, match=VARIANTS[name]) as caught:
        LoraAdapter.open(tmp_path)
    assert name in caught.value.what
    assert caught.value.where.endswith("adapter_model.safetensors")


def test_names_are_taken_apart() -> None:
    assert split_name("base_model.model.a.b.lora_A.weight", where="") == ("a.b", "A")
    assert split_name("base_model.model.a.b.lora_B.weight", where="") == ("a.b", "B")


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({}, FileFormatError, "no tensors"),
        (dict([*pair().items()][:1]), FileFormatError, r"lora_B\.weight is missing"),
        (dict([*pair().items()][1:]), FileFormatError, r"lora_A\.weight is missing"),
        (pair(a=(3, 5)), FileFormatError, "A has rank 3, B has rank 4"),
        (pair(a=(8, 5), b=(3, 8)), FileFormatError, "A has rank 8, B has rank 8, adapter_config.json says 4"),
        (pair(a=(4, 0)), FileFormatError, "factors are empty"),
        (pair(b=(0, 4)), FileFormatError, "factors are empty"),
        (pair(a=(4, 5, 3, 3)), UnsupportedAdapterError, "not linear"),
        (pair(dtype="I64"), UnsupportedAdapterError, "dtype is I64"),
    ],
)
def test_factors_that_are_not_as_configured_are_refused(
    tmp_path: Path, tensors: dict[str, tuple[str, Any]], kind: type[InputError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        LoraAdapter.open(write_adapter(tmp_path, tensors))


def test_a_value_beyond_float32_is_refused(tmp_path: Path) -> None:
    tensors = pair(dtype="F64")
    tensors[f"{PREFIX}.lora_A.weight"][1][0, 0] = 1e300
    adapter = LoraAdapter.open(write_adapter(tmp_path, tensors))
    with pytest.raises(InputError, match=r"the value at \[0, 0\] is inf"):
        adapter.factors("m.q_proj")
    assert adapter.factors("m.q_proj", torch.float64).a_RI[0, 0].item() == 1e300


def test_an_unknown_module_is_told_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no module") as caught:
        LoraAdapter.open(write_adapter(tmp_path, pair())).factors("m.q_porj")
    assert caught.value.mend == "did you mean 'm.q_proj'?"


@pytest.mark.parametrize(
    ("file", "kind", "message"),
    [
        ("adapter_model.bin", FileFormatError, "pickle"),
        ("adapter_model.safetensors.index.json", UnsupportedAdapterError, "sharded"),
        ("README.md", InputError, r"no adapter_model\.safetensors"),
    ],
)
def test_weights_in_other_forms_are_refused(tmp_path: Path, file: str, kind: type[InputError], message: str) -> None:
    write_config(tmp_path)
    (tmp_path / file).write_bytes(b"\x80")
    with pytest.raises(kind, match=message):
        LoraAdapter.open(tmp_path)
