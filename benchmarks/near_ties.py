"""Whether two runs that chose different tokens owe it to rounding: judged by the merged model in float64.

V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import decoding

# Of the logits, relative to their norm, in float32: the bar of mixing-agreement.
ERROR = 1e-5


def is_near_tie(base: str, experts: str, weights: Mapping[str, float], before: Tensor, chosen: tuple[int, int]) -> bool:
    """Return whether two tokens are nearer to each other than the logits of two float32 runs may err.

    Args:
        base, experts: folders.
        weights: of the row.
        before: the tokens before, int64 `[T]`.
        chosen: the token of each run.
    """
    true = merged(base, experts, weights)
    with torch.no_grad():
        logits_V = true(input_ids=before[None]).logits[0, -1]
    owed = 2 * ERROR * float(logits_V.norm())
    return (
        abs(float(logits_V[chosen[0]] - logits_V[chosen[1]])) < owed
        and float(logits_V.max()) - float(logits_V[list(chosen)].max()) < owed
    )


def merged(base: str, experts: str, weights: Mapping[str, float]) -> Any:
    """Return the base in float64 with the weighted deltas folded in, by nothing of ours."""
    model = decoding.load(base, "cpu", "float64")
    for name, weight in weights.items():
        _fold(model, Path(experts) / name, weight)
    return model


def _fold(model: torch.nn.Module, expert: Path, weight: float) -> None:
    from safetensors.torch import load_file

    config = json.loads((expert / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(expert / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    for name, a_RI in tensors.items():
        if ".lora_A." in name:
            b_OR = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            model.get_parameter(f"{module}.weight").data.addmm_(b_OR.double(), a_RI.double(), alpha=weight * scaling)
