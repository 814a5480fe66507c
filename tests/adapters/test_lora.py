from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.names import parse_name
from personalized_soups.errors import FileFormatError, InputError, UnsupportedAdapterError
from tests import experts, oracles
from tests.experts import SHAPES, write_config, write_expert

PREFIX = "base_model.model.m.q_proj"


def write_adapter(folder: Path, tensors: dict[str, tuple[str, Any]], **config: Any) -> Path:
    return experts.write_adapter(folder, tensors, shapes={"m.q_proj": (3, 5)}, **config)


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


UNKNOWN: dict[str, dict[str, Any]] = {
    "base_model.model.lm_head.weight_of_another_kind": {},
    "base_model.model.m.k_proj.weight": {},
    "base_model.model.m.k_proj.bias": {"bias": "lora_only"},
    "base_model.model.m.q_proj.base_layer.bias": {},
    "base_model.model.score.weight": {"modules_to_save": ["classifier"]},
    "base_model.model.m.q_proj.lora_diag.weight": {},
    "base_model.model.m.q_proj.lora_A.default.weight": {},
    "base_model.model.m.embed.token_adapter.base_layer.weight": {},
    "base_model.model.m..lora_A.weight": {},
    "base_model.model.lora_A.weight": {},
    "m.q_proj.lora_A.weight": {},
    f"base_model.model.{'a.' * 600}lora_A.weight": {},
    "base_model.model.m.k_proj.lora_B.bias": {"lora_bias": True},
    "base_model.model.m.score.modules_to_save.bias": {"bias": "all", "modules_to_save": ["k_proj"]},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_tensors_of_which_it_is_not_known_what_they_mean_are_refused_by_name(tmp_path: Path, name: str) -> None:
    tensors = {**pair(), name: ("F32", np.ones(3))}
    if UNKNOWN[name].get("lora_bias"):
        tensors[f"{PREFIX}.lora_B.bias"] = ("F32", np.ones(3))
    with pytest.raises(UnsupportedAdapterError, match="is neither a LoRA factor") as caught:
        LoraAdapter.open(write_adapter(tmp_path, tensors, **UNKNOWN[name]))
    assert name[:80] in caught.value.what
    assert caught.value.where.endswith("adapter_model.safetensors")


def test_names_are_taken_apart() -> None:
    parsed = {
        "a.b.lora_A.weight": ("a.b", "A", 0, None),
        "a.b.lora_B.weight": ("a.b", "B", 0, None),
        "a.b.lora_B.bias": ("a.b", "bias of B", 0, None),
        "a.lora_embedding_A": ("a", "embedding A", 0, None),
        "a.lora_magnitude_vector": ("a", "magnitude", 0, None),
        "a.lora_magnitude_vector.weight": ("a", "magnitude", 0, None),
        "a.token_adapter.trainable_tokens_delta": ("a", "tokens", 0, None),
        "a.base_layer.base_layer.lora_A.weight": ("a", "A", 2, None),
        "a.base_layer.b.lora_A.weight": ("a.b", "A", 0, "a"),
        "a.base_layer.b.base_layer.bias": ("a.b.bias", "whole", 1, "a"),
        "score.dense.weight": ("score.dense.weight", "whole", 0, None),
    }
    for name, (path, role, depth, around) in parsed.items():
        found = parse_name(f"base_model.model.{name}", where="")
        assert (found.path, found.role, found.depth, found.around) == (path, role, depth, around)


@pytest.mark.parametrize(
    ("tensors", "kind", "message"),
    [
        ({}, FileFormatError, "no tensors"),
        (dict([*pair().items()][:1]), FileFormatError, "B is missing"),
        (dict([*pair().items()][1:]), FileFormatError, "A is missing"),
        (pair(a=(3, 5)), FileFormatError, "A has rank 3 and B has rank 4"),
        (pair(a=(8, 5), b=(3, 8)), FileFormatError, "A has rank 8 and B has rank 8, but adapter_config.json says 4"),
        (pair(a=(4, 0)), FileFormatError, "factors are empty"),
        (pair(b=(0, 4)), FileFormatError, "factors are empty"),
        (pair(a=(4, 5, 3, 3)), FileFormatError, r"\[3, 4\] and A of shape \[4, 5, 3, 3\] cannot be multiplied"),
        (pair(a=(4, 5, 3, 3), b=(3, 4, 3, 3)), FileFormatError, "cannot be multiplied"),
        (pair(a=(4,), b=(3,)), FileFormatError, "cannot be multiplied"),
        (pair(a=(4, 5, 3, 3), b=(3, 2, 1, 1)), UnsupportedAdapterError, "a convolution with 2 groups"),
        (pair(dtype="I64"), UnsupportedAdapterError, "has the dtype I64"),
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
        ("adapter_model.safetensors.index.json", FileFormatError, "not UTF-8"),
        ("README.md", InputError, r"no adapter_model\.safetensors"),
    ],
)
def test_weights_in_other_forms_are_refused(tmp_path: Path, file: str, kind: type[InputError], message: str) -> None:
    write_config(tmp_path)
    (tmp_path / file).write_bytes(b"\x80")
    with pytest.raises(kind, match=message):
        LoraAdapter.open(tmp_path)


def whole(*shape: int) -> tuple[str, Any]:
    return ("F32", np.ones(shape))


MISFITS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "use_dora is false": ({f"{PREFIX}.lora_magnitude_vector": whole(3)}, {}),
    "lora_bias is false": ({f"{PREFIX}.lora_B.bias": whole(3)}, {}),
    "has no magnitude for base_model.model.m.q_proj": ({}, {"use_dora": True}),
    "has no bias for .*lora_B.weight": ({}, {"lora_bias": True}),
    r"has shape \[5\], but the module has 3 outputs": (
        {f"{PREFIX}.lora_magnitude_vector": whole(5)},
        {"use_dora": True},
    ),
    "the file has no rows": ({}, {"trainable_token_indices": [1]}),
    r"has shape \[2, 5\], but the configuration names 1 tokens": (
        {"base_model.model.m.embed.token_adapter.trainable_tokens_delta": whole(2, 5)},
        {"trainable_token_indices": [1]},
    ),
    "trainable_token_indices has 0 lists for m.embed": (
        {"base_model.model.m.embed.token_adapter.trainable_tokens_delta": whole(2, 5)},
        {"trainable_token_indices": {"wte": [1, 2]}},
    ),
    "trainable_token_indices has 2 lists for m.embed": (
        {"base_model.model.m.embed.token_adapter.trainable_tokens_delta": whole(2, 5)},
        {"trainable_token_indices": {"embed": [1, 2], "m.embed": [1, 3]}},
    ),
    r"is empty: its shape is \[0, 5\]": (
        {"base_model.model.score.weight": whole(0, 5)},
        {"modules_to_save": ["score"]},
    ),
}


@pytest.mark.parametrize("message", MISFITS)
def test_trained_tensors_that_are_not_as_configured_are_refused(tmp_path: Path, message: str) -> None:
    tensors, config = MISFITS[message]
    with pytest.raises(FileFormatError, match=message):
        LoraAdapter.open(write_adapter(tmp_path, {**pair(), **tensors}, **config))


def test_trained_tensors_are_what_the_file_holds(tmp_path: Path) -> None:
    values = np.arange(10.0).reshape(2, 5)
    name = "base_model.model.embed.token_adapter.trainable_tokens_delta"
    magnitude = f"{PREFIX}.lora_magnitude_vector"
    write_adapter(
        tmp_path,
        {**pair(), name: ("BF16", values), magnitude: ("F32", np.arange(3.0).reshape(1, 3, 1))},
        trainable_token_indices=[7, 3],
        use_dora=True,
    )
    adapter = LoraAdapter.open(tmp_path)
    assert list(adapter.trained) == [name, magnitude]
    tokens = adapter.trained[name]
    assert (tokens.kind, tokens.target, tokens.rows, tokens.shape) == ("rows", "embed.weight", (7, 3), (2, 5))
    assert (adapter.trained[magnitude].target, adapter.trained[magnitude].module) == ("m.q_proj.weight", "m.q_proj")
    np.testing.assert_array_equal(adapter.trained_tensor(name, torch.float64).numpy(), values)
    assert adapter.trained_tensor(name, None).dtype == torch.bfloat16
    np.testing.assert_array_equal(adapter.trained_tensor(magnitude).numpy(), [0, 1, 2])
    assert adapter.dtypes == {"BF16", "F32"}
    with pytest.raises(InputError, match="no trained tensor") as caught:
        adapter.trained_tensor(f"{PREFIX}.lora_magnitude_vectors")
    assert caught.value.mend == f"did you mean {magnitude!r}?"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_trained_tensor_that_diverged_is_refused_by_name(tmp_path: Path, value: float) -> None:
    values = np.ones((2, 5))
    values[1, 2] = value
    tensors = {**pair(), "base_model.model.score.weight": ("F32", values)}
    adapter = LoraAdapter.open(write_adapter(tmp_path, tensors, modules_to_save=["score"]))
    with pytest.raises(InputError, match=r"score\.weight: the value at \[1, 2\] is (nan|inf)") as caught:
        adapter.trained_tensor("base_model.model.score.weight")
    assert caught.value.where == str(tmp_path / "adapter_model.safetensors")


EXPERTS = "base_model.model.mlp.experts"


def test_parameters_that_cannot_be_told_apart_are_refused(tmp_path: Path) -> None:
    inner = {f"{EXPERTS}.base_layer.lora_{name.rpartition('lora_')[2]}": values for name, values in pair().items()}
    outer = {f"{EXPERTS}.lora_{name.rpartition('lora_')[2]}": values for name, values in pair().items()}
    for tensors, targets in (
        (outer, ["mlp.experts.up_proj", "mlp.experts.down_proj"]),
        ({**inner, **outer}, ["mlp.experts.first", "mlp.experts.second"]),
        (inner, ["mlp.experts.up_proj"]),
        ({**inner, **outer}, ["up_proj", "down_proj", "w1"]),
    ):
        with pytest.raises(UnsupportedAdapterError, match=r"mlp\.experts: target_parameters does not say"):
            LoraAdapter.open(write_adapter(tmp_path, tensors, target_parameters=targets))
    with pytest.raises(UnsupportedAdapterError, match="is neither a LoRA factor"):
        LoraAdapter.open(write_adapter(tmp_path, {**inner, **outer}))


def test_a_change_inside_of_another_is_refused(tmp_path: Path) -> None:
    out_proj = {name.replace("m.q_proj", "m.base_layer.out_proj"): values for name, values in pair().items()}
    whole_m = {name.replace("m.q_proj", "m"): values for name, values in pair().items()}
    with pytest.raises(
        UnsupportedAdapterError, match=r"m\.out_proj is adapted inside the adapted module m, .* MultiheadAttention"
    ):
        LoraAdapter.open(write_adapter(tmp_path, {**out_proj, **whole_m}))
    owned = LoraAdapter.open(write_adapter(tmp_path, {**out_proj, **whole_m}, target_parameters=["m.weight"]))
    assert {name: module.base_name for name, module in owned.modules.items()} == {
        "m.out_proj": "m.out_proj.weight",
        "m.weight": "m.weight",
    }
