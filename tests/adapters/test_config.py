from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.adapters.config import AdapterConfig
from personalized_soups.errors import FileFormatError, InputError, UnsupportedAdapterError
from tests import oracles
from tests.experts import write_config


def opened(folder: Path, **config: Any) -> AdapterConfig:
    write_config(folder, **config)
    return AdapterConfig.open(folder)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_initialisations_that_leave_the_base_alone_are_taken(tmp_path: Path, init: Any) -> None:
    assert opened(tmp_path, init_lora_weights=init).rank == 4


@pytest.mark.parametrize(
    ("init", "mend"),
    [
        ("pissa", "convert it to plain LoRA"),
        ("pissa_niter_16", "convert it to plain LoRA"),
        ("olora", "convert it to plain LoRA"),
        ("corda", "convert it to plain LoRA"),
        ("lora_ga", "convert it to plain LoRA"),
        ("loftq", "train the expert with"),
        ("tomorrow", "train the expert with"),
        (1, "train the expert with"),
    ],
)
def test_every_other_initialisation_is_refused_by_name(tmp_path: Path, init: Any, mend: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"init_lora_weights is {init!r}") as caught:
        opened(tmp_path, init_lora_weights=init)
    assert caught.value.mend.startswith(mend)
    assert caught.value.where == str(tmp_path / "adapter_config.json")


# What PEFT reads as well as what it writes itself.
ODD: dict[str, dict[str, Any]] = {
    "flags of null": dict.fromkeys(["use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"]),
    "flags of 0": dict.fromkeys(["use_rslora", "use_dora", "fan_in_fan_out", "lora_bias", "ensure_weight_tying"], 0),
    "a flag of 1": {"use_rslora": 1},
    "no initialisation": {"init_lora_weights": None},
    "initialisation 0": {"init_lora_weights": 0},
    "capitals": {"init_lora_weights": "Gaussian"},
    "no rank": {"r": ...},
    "no alpha": {"lora_alpha": ...},
    "alpha of a fraction": {"lora_alpha": 6.5},
    "nothing else": dict.fromkeys(["modules_to_save", "trainable_token_indices", "layer_replication", "task_type"]),
}
# What PEFT refuses, or reads as something else than it seems to say.
WRONG: dict[str, dict[str, Any]] = {
    "a flag of text": {"use_rslora": "false"},
    "a rank that is no whole number": {"r": 8.0},
    "a rank of null": {"r": None},
    "alpha of text": {"lora_alpha": "6"},
    "alpha of null": {"lora_alpha": None},
    "modules of text": {"modules_to_save": "norm"},
    "a type in small letters": {"peft_type": "lora"},
    "KaSA with its defaults": {"kasa_config": {}},
    "Arrow with its defaults": {"arrow_config": {}},
    "VeLoRA with its defaults": {"velora_config": {}},
    "MonteCLoRA with its defaults": {"monteclora_config": {}},
    "BD-LoRA with its defaults": {"use_bdlora": {}},
}


def test_what_peft_reads_is_read_alike(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tests.adapters.peft_oracle import rebuilt, reloaded, saved
    from tests.adapters.test_against_peft import llama

    base = llama().state_dict()

    def make() -> Any:
        model = llama()
        model.load_state_dict(base)
        return model

    case = saved(tmp_path, make(), target_modules=["q_proj"], r=8)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    for name, odd in ODD.items():
        path.write_text(json.dumps({key: value for key, value in {**written, **odd}.items() if value is not ...}))
        want, got = reloaded(tmp_path, make()), rebuilt(tmp_path, case.base)
        for tensor, merged in want.items():
            # PEFT rounds the product, its scaling and the sum to float32, each once an element of rank 8
            room = 16 * 2.0**-24 * float((case.base[tensor].double().abs() + merged.double().abs()).norm())
            assert float((got[tensor] - merged.double()).norm()) <= room, (name, tensor)


@pytest.mark.parametrize("kind", WRONG)
def test_what_means_something_else_to_peft_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises((FileFormatError, UnsupportedAdapterError), match=next(iter(WRONG[kind]))):
        opened(tmp_path, **WRONG[kind])


def test_a_git_lfs_pointer_is_named_with_the_command(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(oracles.LFS_POINTER)
    with pytest.raises(FileFormatError, match="this is a Git LFS pointer") as caught:
        AdapterConfig.open(tmp_path)
    assert "git lfs pull" in caught.value.mend


REFUSED = {
    "bias": "some",
    "layer_replication": [[0, 4], [2, 5]],
    "alora_invocation_tokens": [5],
    "megatron_config": {"a": 1},
    "use_qalora": True,
    "loftq_config": {"loftq_bits": 4},
    "kasa_config": {"beta": 1e-4},
    "arrow_config": {"top_k": 3},
    "use_bdlora": {"nblocks": 2},
    "monteclora_config": {"num_samples": 8},
    "velora_config": {"num_groups": 2},
    "use_something_of_next_year": True,
    "something_of_next_year": "on",
}


@pytest.mark.parametrize("key", REFUSED)
def test_every_variant_is_refused_by_name(tmp_path: Path, key: str) -> None:
    with pytest.raises(UnsupportedAdapterError, match=key):
        opened(tmp_path, **{key: REFUSED[key]})


@pytest.mark.parametrize("value", [None, False, {}, []])
def test_an_unknown_key_that_is_switched_off_is_no_fault(tmp_path: Path, value: Any) -> None:
    assert opened(tmp_path, something_of_next_year=value).rank == 4


@pytest.mark.parametrize("kind", ["ADALORA", "LOHA", None, 3])
def test_adapters_of_other_types_are_refused_by_name(tmp_path: Path, kind: Any) -> None:
    with pytest.raises(UnsupportedAdapterError, match=f"peft_type is {kind!r}"):
        opened(tmp_path, peft_type=kind)


def test_what_pefts_own_defaults_say_is_taken(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    config = AdapterConfig.open(tmp_path)
    assert (config.rank, config.lora_alpha, config.target_modules) == (8, 16, ("q_proj",))
    assert config.scaling_of("model.layers.0.self_attn.q_proj") == 2


def test_patterns_match_as_in_peft(tmp_path: Path) -> None:
    from peft.utils.other import get_pattern_key

    rank_pattern = {"layers.1.q_proj": 2, "^model.k_proj": 3, "v_proj$": 5, "q_proj": 7}
    config = opened(tmp_path, rank_pattern=rank_pattern, alpha_pattern={"up_proj": 3.0}, alpha=8)
    for module in ("model.layers.1.q_proj", "model.layers.2.q_proj", "model.k_proj", "x.model.k_proj", "a.v_proj",
                   "xq_proj", "model.layersX1.q_proj", "up_proj"):  # fmt: skip
        assert config.rank_of(module) == rank_pattern.get(get_pattern_key(list(rank_pattern), module), 4)
    assert config.scaling_of("m.up_proj") == 3.0 / 4
    assert config.scaling_of("m.q_proj") == 8 / 7


def test_rs_lora_divides_by_the_square_root(tmp_path: Path) -> None:
    assert opened(tmp_path, rank=16, alpha=8, use_rslora=True).scaling_of("q_proj") == 2


def test_a_strangers_regular_expression_cannot_run_for_years(tmp_path: Path) -> None:
    # Python's own `re` would not end: the suite's timeout would.
    assert opened(tmp_path, rank_pattern={"(a+)+b": 2}).rank_of("a" * 2000) == 4
    with pytest.raises(UnsupportedAdapterError, match=r"alpha_pattern: the regular expression .* has groupref"):
        opened(tmp_path, alpha_pattern={r"(a)\1": 2})


def test_what_is_trained_whole_is_read(tmp_path: Path) -> None:
    config = opened(
        tmp_path,
        use_dora=True,
        lora_bias=True,
        bias="lora_only",
        fan_in_fan_out=True,
        ensure_weight_tying=True,
        modules_to_save=["score"],
        target_parameters=["mlp.experts.down_proj"],
        trainable_token_indices={"wte": [3, 1]},
    )
    assert (config.use_dora, config.lora_bias, config.fan_in_fan_out, config.ensure_weight_tying) == (True,) * 4
    assert (config.bias, config.modules_to_save) == ("lora_only", ("score",))
    assert (config.target_parameters, config.trainable_tokens) == (("mlp.experts.down_proj",), {"wte": (3, 1)})


def test_settings_of_an_initialisation_that_was_converted_are_no_fault(tmp_path: Path) -> None:
    assert opened(tmp_path, corda_config={"corda_method": "ipm"}, lora_ga_config={"direction": "ArBr"}).rank == 4


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"r": 4, "r": 8}', '{"peft_type": "LORA", "r": NaN}', "[" * 100_000, "\xff"],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "adapter_config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(InputError) as caught:
        AdapterConfig.open(tmp_path)
    assert "adapter_config.json" in caught.value.where


@pytest.mark.parametrize(
    "config",
    [
        {"r": 0},
        {"r": -4},
        {"r": "4"},
        {"r": True},
        {"r": 4.0},
        {"lora_alpha": "8"},
        {"lora_alpha": None},
        {"lora_alpha": 10**40},
        {"use_rslora": "yes"},
        {"rank_pattern": ["q_proj"]},
        {"modules_to_save": "score"},
        {"modules_to_save": ["score"] * 1001},
        {"target_parameters": [3]},
        {"use_dora": "yes"},
        {"trainable_token_indices": 3},
        {"trainable_token_indices": [3, -1]},
        {"trainable_token_indices": [3, 3]},
        {"trainable_token_indices": {"wte": [1.0]}},
        {"rank_pattern": {"q_proj": 0}},
        {"alpha_pattern": {"q_proj": "8"}},
        {"base_model_name_or_path": 3},
    ],
)
def test_values_out_of_place_are_refused_by_key(tmp_path: Path, config: dict[str, Any]) -> None:
    write_config(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    with pytest.raises(FileFormatError, match=next(iter(config))):
        AdapterConfig.open(tmp_path)


def test_a_folder_without_configuration_is_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not a LoRA adapter: it has no adapter_config\.json") as caught:
        AdapterConfig.open(tmp_path)
    assert caught.value.where == str(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_configuration(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(InputError, match="not a regular file"):
        AdapterConfig.open(tmp_path)
