"""Expert folders for tests, written by hand so that neither PEFT nor the package has a part in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests import oracles

# The linear layers of the fixture small_base: name, out features, in features.
SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in (0, 1)
    for name, shape in {
        "self_attn.q_proj": (64, 64),
        "self_attn.k_proj": (32, 64),
        "mlp.up_proj": (96, 64),
        "mlp.down_proj": (64, 96),
    }.items()
}


def write_expert(
    folder: Path,
    *,
    seed: int = 0,
    rank: int = 4,
    alpha: float = 8,
    dtype: str = "F32",
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    a_seed: int | None = None,
    base: str | None = "base",
    **config: Any,
) -> Path:
    """Write a random LoRA folder and return it; experts of one `a_seed` have the same A's, byte for byte."""
    a_random = np.random.default_rng(1000 + seed if a_seed is None else a_seed)
    b_random = np.random.default_rng(seed)
    tensors: dict[str, tuple[str, Any]] = {}
    for module, (out_features, in_features) in shapes.items():
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = (dtype, a_random.normal(size=(rank, in_features)) / 8)
        tensors[f"{name}.lora_B.weight"] = (dtype, b_random.normal(size=(out_features, rank)) / 8)
    return write_adapter(folder, tensors, rank=rank, alpha=alpha, shapes=shapes, base=base, **config)


def write_adapter(folder: Path, tensors: Mapping[str, tuple[str, Any]], **config: Any) -> Path:
    """Write a LoRA folder of any tensors, `name in the file -> (dtype, values)`, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    oracles.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_config(folder, **config)
    return folder


def write_config(
    folder: Path,
    *,
    rank: int = 4,
    alpha: float = 8,
    shapes: Mapping[str, tuple[int, int]] = SHAPES,
    base: str | None = "base",
    **config: Any,
) -> None:
    """Write adapter_config.json as PEFT does; further keys as given."""
    table = {
        "base_model_name_or_path": base,
        "bias": "none",
        "init_lora_weights": True,
        "lora_alpha": alpha,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({module.rpartition(".")[2] for module in shapes}),
        "task_type": "CAUSAL_LM",
        **config,
    }
    (folder / "adapter_config.json").write_text(json.dumps(table))


def write_record(folder: Path, **fields: Any) -> None:
    """Write expert.json."""
    (folder / "expert.json").write_text(json.dumps({"side": folder.name, **fields}))
