"""Every variant that is merged, held to PEFT: one expert of weight 1 makes of a base what PEFT's merge makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.tying import tied_copies
from tests.adapters.peft_oracle import Saved, rebuilt, saved

ATTENTION: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 20,
}


def llama(*, tied: bool = False, biased: bool = False, head: str = "CausalLM") -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        tie_word_embeddings=tied,
        attention_bias=biased,
        mlp_bias=biased,
        pad_token_id=0,
        **ATTENTION,
    )
    model: nn.Module = getattr(transformers, f"LlamaFor{head}")(config)
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=20,
            n_embd=16,
            n_layer=1,
            n_head=2,
            n_positions=8,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
        )
    )


def mixtral() -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(hidden_size=16, intermediate_size=12, num_local_experts=3, **ATTENTION))


def gpt_oss(intermediate_size: int = 16) -> nn.Module:
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(
        GptOssConfig(hidden_size=16, intermediate_size=intermediate_size, num_local_experts=3, head_dim=8, **ATTENTION)
    )


class Convolutions(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one = nn.Conv1d(4, 5, 2)
        self.two = nn.Conv2d(4, 6, 3, groups=groups)
        self.three = nn.Conv3d(2, 1, 2)
        self.point = nn.Conv2d(3, 5, 1)


CONVOLUTIONS = ["one", "two", "three", "point"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "plain": (llama, {"target_modules": ["q_proj", "down_proj"]}),
    "rslora": (llama, {"target_modules": ["q_proj"], "use_rslora": True}),
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
            "rank_pattern": {r"layers\.\d+\.self_attn\.(q|v)_proj": 2, "up_proj": 3},
            "alpha_pattern": {r"[^.]*attn\..*": 5, "up_proj": 1},
        },
    ),
    "chosen layers": (llama, {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}),
    "excluded": (llama, {"target_modules": "all-linear", "exclude_modules": ["v_proj"]}),
    "mica": (llama, {"target_modules": ["q_proj"], "init_lora_weights": "mica"}),
    "bias all": (lambda: llama(biased=True), {"target_modules": ["q_proj"], "bias": "all"}),
    "bias lora_only": (lambda: llama(biased=True), {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias all and modules_to_save": (
        lambda: llama(biased=True), {"target_modules": ["q_proj"], "bias": "all", "modules_to_save": ["up_proj"]},
    ),
    "lora_bias": (lambda: llama(biased=True), {"target_modules": ["q_proj"], "lora_bias": True}),
    "dora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "dora on an embedding": (llama, {"target_modules": ["embed_tokens"], "use_dora": True}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "head": (lambda: llama(head="SequenceClassification"), {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}),
    "modules_to_save": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]}),
    "saved and tied": (
        lambda: llama(tied=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": (llama, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]}),
    "tokens of two": (
        llama, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    # attn.c_proj is square, and PEFT saves lm_head's fan_in_fan_out, which is false
    "conv1d and linear": (gpt2, {"target_modules": ["c_proj", "lm_head"]}),
    "conv1d, dora": (gpt2, {"target_modules": ["c_attn", "c_proj"], "use_dora": True}),
    "conv1d, lora_bias": (gpt2, {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"}),
    "convolutions": (Convolutions, {"target_modules": CONVOLUTIONS, "lora_bias": True, "use_rslora": True}),
    "convolutions, dora": (Convolutions, {"target_modules": CONVOLUTIONS, "use_dora": True}),
    "experts of a mixture": (mixtral, {"target_modules": ["q_proj"], "target_parameters": EXPERTS}),
    "one parameter, and a matrix": (
        mixtral,
        {
            "target_modules": [], "target_parameters": ["experts.down_proj", "gate.weight"],
            "rank_pattern": {"experts.down_proj": 2}, "alpha_pattern": {"mlp.gate.weight": 1},
        },
    ),
    # down_proj is square: how it lies is known from gate_up_proj
    "transposed experts": (gpt_oss, {"target_modules": ["q_proj"], "target_parameters": EXPERTS, "bias": "all"}),
}  # fmt: skip


def assert_equal(case: Saved) -> None:
    got = rebuilt(case.folder, case.base)
    assert got.keys() == case.merged.keys()
    changed = 0
    for name, merged in case.merged.items():
        if merged.is_floating_point():
            # PEFT rounds to float32 once for each of the at most 8 ranks, the scaling and the sum, and a few times more
            # for DoRA's norm and quotient: 16 * 2^-24 = 9.5e-7
            assert torch.linalg.norm(got[name] - merged) <= 1e-6 * torch.linalg.norm(merged), name
            changed += not torch.equal(merged, case.base[name])
    assert changed, "PEFT merged nothing"


@pytest.mark.parametrize("name", CASES)
def test_one_expert_of_weight_1_is_what_peft_merges(tmp_path: Path, name: str) -> None:
    model, config = CASES[name]
    torch.manual_seed(0)
    assert_equal(saved(tmp_path, model(), **config))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_adapters_of_any_float_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    from safetensors.torch import load_file, save_file

    case = saved(tmp_path, llama(), target_modules=["q_proj", "v_proj"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = {
        # B stays in float32: an adapter's tensors need not have one dtype
        name: tensor.to(dtype) if "lora_A" in name else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(tensors, path)
    got = rebuilt(tmp_path, case.base)
    for name in ("q_proj", "v_proj"):
        full = f"model.layers.0.self_attn.{name}"
        a, b = (tensors[f"base_model.model.{full}.lora_{factor}.weight"].double() for factor in "AB")
        torch.testing.assert_close(got[f"{full}.weight"], case.base[f"{full}.weight"] + 1.5 * (b @ a))


def test_an_adapter_in_shards_is_the_adapter_in_one_file(tmp_path: Path) -> None:
    import json

    from safetensors.torch import load_file, save_file

    case = saved(tmp_path, llama(), target_modules=["q_proj"], modules_to_save=["lm_head"])
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    path.unlink()
    weight_map = {}
    for number, (name, tensor) in enumerate(tensors.items(), start=1):
        weight_map[name] = f"adapter_model-{number:05}-of-{len(tensors):05}.safetensors"
        save_file({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / "adapter_model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_equal(case)
    adapter = LoraAdapter.open(tmp_path)
    assert {path.name for path in adapter.files} == {"adapter_config.json", *weight_map.values()}
    assert adapter.num_bytes == sum((tmp_path / file).stat().st_size for file in weight_map.values())


def test_a_converted_pissa_adapter_is_a_plain_one(tmp_path: Path) -> None:
    import warnings

    from peft import LoraConfig, get_peft_model

    model = llama()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa")
        wrapped = get_peft_model(model, config)
        config.init_lora_weights = True
        wrapped.save_pretrained(str(tmp_path / "initial"))
        config.init_lora_weights = "pissa"
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        wrapped.save_pretrained(
            str(tmp_path / "converted"), path_initial_model_for_weight_conversion=str(tmp_path / "initial")
        )
        merged = wrapped.merge_and_unload().state_dict()
    name = "model.layers.0.self_attn.q_proj.weight"
    got = rebuilt(tmp_path / "converted", base)[name]
    # PEFT splits W and adds its parts up again: a few more roundings than above
    assert torch.linalg.norm(got - merged[name]) <= 4e-6 * torch.linalg.norm(merged[name])


def test_the_second_copy_of_a_tied_change_is_known(tmp_path: Path) -> None:
    """PEFT's merge adds it twice to the one tensor, so the forward pass is the oracle: once for each layer."""
    case = saved(tmp_path, llama(tied=True), target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)
    adapter = LoraAdapter.open(tmp_path)
    assert tied_copies(adapter) == {
        "lm_head": "model.embed_tokens",
        "base_model.model.lm_head.base_layer.weight": "base_model.model.model.embed_tokens.base_layer.weight",
    }
    got = rebuilt(tmp_path, {name: tensor.clone() for name, tensor in case.base.items()})
    once = got["lm_head.weight"] - case.base["lm_head.weight"]
    torch.testing.assert_close(once, got["model.embed_tokens.weight"] - case.base["lm_head.weight"])
    twice = case.merged["lm_head.weight"] - case.base["lm_head.weight"]
    assert torch.linalg.norm(twice - 2 * once) <= 1e-5 * torch.linalg.norm(twice)


def test_saved_copies_of_a_tied_embedding_are_known(tmp_path: Path) -> None:
    tied: dict[str, Any] = {"modules_to_save": ["embed_tokens"], "target_modules": ["q_proj"]}
    saved(tmp_path / "a", llama(tied=True), **tied, ensure_weight_tying=True)
    assert tied_copies(LoraAdapter.open(tmp_path / "a")) == {
        "base_model.model.lm_head.weight": "base_model.model.model.embed_tokens.weight"
    }
    saved(tmp_path / "b", llama(tied=True), **tied)
    assert not tied_copies(LoraAdapter.open(tmp_path / "b"))
