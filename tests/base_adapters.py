"""SFT adapters on top of which experts are trained, and oracles of base + adapter: NumPy in float64, and PEFT."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from personalized_soups.adapters.base_adapter import BaseAdapter
from tests import oracles
from tests.experts import write_adapter

# Of small_base's layers: some that the experts of tests/experts.py adapt, and some that only this adapter adapts.
SFT_SHAPES = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.0.self_attn.v_proj": (32, 64),
    "model.layers.1.self_attn.o_proj": (64, 64),
    "model.layers.1.mlp.up_proj": (96, 64),
    "model.layers.1.mlp.gate_proj": (96, 64),
}
SFT_RANKS = {"model.layers.1.mlp.up_proj": 2}
SFT_ALPHAS = {"model.layers.0.self_attn.q_proj": 7.0}


def write_sft(folder: Path, *, seed: int = 90, size: float = 1 / 8, **config: Any) -> Path:
    """Write an SFT adapter with rsLoRA, other targets than the experts, and one module each of another rank and alpha.

    `size` is the standard deviation of the factors.
    """
    random = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Any]] = {}
    for module, (out_features, in_features) in SFT_SHAPES.items():
        rank = SFT_RANKS.get(module, 3)
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = ("F32", random.normal(size=(rank, in_features)) * size)
        tensors[f"{name}.lora_B.weight"] = ("F32", random.normal(size=(out_features, rank)) * size)
    options = {
        "rank": 3,
        "alpha": 5,
        "use_rslora": True,
        "rank_pattern": SFT_RANKS,
        "alpha_pattern": SFT_ALPHAS,
        "target_modules": sorted(SFT_SHAPES),
    }
    return write_adapter(folder, tensors, shapes=SFT_SHAPES, **{**options, **config})


def trained_on(expert: Path, sft: Path | None, **fields: Any) -> Path:
    """Write the expert.json of an expert that was trained on top of `sft`, or on the base alone. Return the folder."""
    opened = None if sft is None else BaseAdapter.open(sft)
    on = {} if opened is None else {"on": {"name": opened.name, "digest": opened.digest}}
    (expert / "expert.json").write_text(json.dumps({"side": expert.name, **on, **fields}))
    return expert


def write_merged_base(base: Path, sft: Path, out: Path) -> Path:
    """Write the base with PEFT's merge of the adapter, in float32."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(base)
    PeftModel.from_pretrained(model, str(sft)).merge_and_unload().save_pretrained(out)
    AutoTokenizer.from_pretrained(base).save_pretrained(out)
    return out


def float64_weights(base: Path, adapters: Sequence[Path], weights: Sequence[float]) -> dict[str, oracles.Matrix]:
    """Return the adapted weights of the base plus the weighted deltas, in float64 by NumPy."""
    own = oracles.read_tensors(base / "model.safetensors")
    total = oracles.soup(adapters, weights)
    return {name: own[f"{name}.weight"].astype(np.float64) + delta for name, delta in total.items()}


def bounds(
    base: Path, adapters: Sequence[Path], weights: Sequence[float], *, num_ranks: int
) -> Mapping[str, oracles.Matrix]:
    """Return the largest difference of a float32 sum `W + sum (w s B) A` from its exact value, for each entry.

    A sum of `n` float32 products has an error of at most `n 2^-24` times the sum of their magnitudes. Each product has
    two more roundings (`w s` times B, and the product), and the sum has the summand W: (num_ranks + 3) roundings.
    """
    own = oracles.read_tensors(base / "model.safetensors")
    sizes = oracles.magnitudes(adapters, weights)
    return {
        name: (num_ranks + 3) * 2.0**-24 * (np.abs(own[f"{name}.weight"].astype(np.float64)) + size)
        for name, size in sizes.items()
    }
