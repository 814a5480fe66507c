"""Bases and experts of every variant, and the dense float64 formula over PEFT's merge of each single expert.

`W + sum w_e (W'_e - W)` holds for every variant of LoRA (algorithms.md), with W'_e the model that PEFT's
merge_and_unload makes of expert e alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalized_soups import ExpertLibrary
from tests.adapters.peft_oracle import Saved, Tensors, saved
from tests.adapters.test_against_peft import CONVOLUTIONS, EXPERTS, Convolutions, gpt2, gpt_oss, llama, mixtral

Config = Mapping[str, Any]

# They sum to 1.4: no law of averages holds for them.
WEIGHTS = (0.7, -0.4, 1.1, 0.3)

# Experts of different variants over one base, by what is mixed.
MIXTURES: dict[str, tuple[Callable[[], nn.Module], Sequence[dict[str, Any]]]] = {
    "dora and plain": (
        llama,
        [
            {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
            {"target_modules": ["q_proj", "v_proj"], "use_rslora": True},
        ],
    ),
    "two doras": (
        llama,
        [
            {"target_modules": ["q_proj", "v_proj"], "use_dora": True},
            {"target_modules": ["q_proj", "o_proj"], "use_dora": True, "r": 3, "rank_pattern": {"o_proj": 2}},
        ],
    ),
    "saved and adapted": (
        llama,
        [
            {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "input_layernorm"]},
            {"target_modules": ["lm_head", "q_proj"]},
            {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        ],
    ),
    "biases": (
        lambda: llama(biased=True),
        [
            {"target_modules": ["q_proj"], "bias": "all"},
            {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
            {"target_modules": ["v_proj"], "bias": "lora_only"},
        ],
    ),
    "tokens": (
        llama,
        [
            {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}},
            {"target_modules": ["embed_tokens"]},
        ],
    ),
    "embeddings": (
        llama,
        [
            {"target_modules": ["embed_tokens", "lm_head"]},
            {"target_modules": ["embed_tokens"], "use_dora": True},
            {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        ],
    ),
    "conv1d": (
        gpt2,
        [
            {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
            {"target_modules": ["c_attn", "c_fc"], "use_dora": True},
            {"target_modules": ["c_attn"], "lora_bias": True, "bias": "all"},
        ],
    ),
    "convolutions": (
        Convolutions,
        [
            {"target_modules": CONVOLUTIONS, "use_rslora": True},
            {"target_modules": ["one", "two"], "use_dora": True},
            {"target_modules": ["two", "three"], "lora_bias": True},
        ],
    ),
    "experts of a mixture": (
        mixtral,
        [
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
            {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"], "r": 2},
            {"target_modules": [], "target_parameters": ["experts.gate_up_proj"]},
        ],
    ),
    "transposed experts": (
        gpt_oss,
        [
            {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
            {"target_modules": ["v_proj"], "target_parameters": EXPERTS[1:], "bias": "all"},
        ],
    ),
}


@dataclass(frozen=True)
class World:
    """A base model's folder, its tensors, and experts on it as PEFT saved and merged them."""

    base: Path
    tensors: Tensors
    experts: Mapping[str, Saved]

    @property
    def library(self) -> ExpertLibrary:
        """The experts."""
        return ExpertLibrary.open(*(each.folder for each in self.experts.values()))

    def soup(self, weights: Mapping[str, float]) -> Tensors:
        """Return `W + sum w_e (W'_e - W)` of every tensor of the base, in float64."""
        return {name: dense(name, tensor, weights, self.experts) for name, tensor in self.tensors.items()}


def named_weights(count: int) -> dict[str, float]:
    """Return weights of the first experts of a world."""
    return {f"e{number}": WEIGHTS[number] for number in range(count)}


def dense(name: str, tensor: Tensor, weights: Mapping[str, float], experts: Mapping[str, Saved]) -> Tensor:
    """Return one tensor of the soup; integer tensors are not changed."""
    if not tensor.is_floating_point():
        return tensor
    steps = [weights[expert] * (experts[expert].merged[name].double() - tensor.double()) for expert in weights]
    return torch.stack([tensor.double(), *steps]).sum(dim=0)


def make_world(
    root: Path,
    make: Callable[[], nn.Module],
    configs: Sequence[Config],
    *,
    dtype: torch.dtype = torch.float32,
    left_out: Iterable[str] = (),
) -> World:
    """Write a random base in `dtype` (without the tensors `left_out`) and one expert for each config, e0, e1, ..."""
    root.mkdir(parents=True, exist_ok=True)
    experts = {
        f"e{number}": _expert(root / f"e{number}", make, dtype, number, each) for number, each in enumerate(configs)
    }
    tensors = experts["e0"].base
    base = root / "base"
    base.mkdir()
    gone = set(left_out)
    kept = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items() if name not in gone}
    save_file(kept, base / "model.safetensors", {"format": "pt"})
    config = getattr(make(), "config", None)
    (base / "config.json").write_text("{}" if config is None else config.to_json_string(use_diff=False))
    return World(base, tensors, experts)


def _expert(folder: Path, make: Callable[[], nn.Module], dtype: torch.dtype, seed: int, config: Config) -> Saved:
    # all experts have one base; PEFT merges it in float32, in which every value of the base's dtype is exact
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = make()
        for parameter in model.parameters():
            parameter.data.add_(0.3 * torch.randn_like(parameter))  # biases and norms are constant otherwise
        model.to(dtype).float()
    return saved(folder, model, seed=100 + seed, **config)


def read(folder: Path) -> Tensors:
    """Return every tensor of a model folder."""
    return {
        name: tensor for path in sorted(folder.glob("model*.safetensors")) for name, tensor in load_file(path).items()
    }
