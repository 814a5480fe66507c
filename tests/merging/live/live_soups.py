"""Live soups of every kind for tests, and the live factors in a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from personalized_soups import ExpertLibrary, LiveAdapter, Profile
from tests.experts import SHAPES, write_expert
from tests.oracles import Matrix

NAMES = ("one", "three", "two")
MODULE = "model.layers.0.mlp.up_proj"

# For each kind of live soup: the options of the experts, and those of the LiveAdapter.
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "free": ({"rank": (2, 5, 3), "alpha": (8, 3, 16), "use_rslora": (False, True, False)}, {}),
    "shared": ({"a_seed": 7, "alpha": (8, 3, 16)}, {}),
    "average": ({}, {"method": "factor_average"}),
    "peft": ({"alpha": (8, 3, 16)}, {"method": "factor_linear"}),
}


def write_experts(root: Path, *, shapes: Any = SHAPES, **options: Any) -> ExpertLibrary:
    """Write three experts. An option that is a tuple has one value for each expert."""
    for index, name in enumerate(NAMES):
        chosen = {key: value[index] if isinstance(value, tuple) else value for key, value in options.items()}
        write_expert(root / name, seed=index, shapes=shapes, **chosen)
    return ExpertLibrary.open(root)


def live_of(kind: str, root: Path, device: str, **options: Any) -> tuple[ExpertLibrary, LiveAdapter]:
    experts, settings = KINDS[kind]
    library = write_experts(root, **experts)
    return library, LiveAdapter(library, device=device, **settings, **options)


def profile_of(weights: Sequence[float], **options: Any) -> Profile:
    return Profile(weights=dict(zip(NAMES, weights, strict=True)), **options)


def base_model(folder: Path, device: str = "cpu") -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        values: Tensor = model(torch.tensor([[7, 11, 13, 17, 19, 23]], device=model.device)).logits
    return values


def layers(model: Any, adapter: str = "soup") -> dict[str, Any]:
    """Return the layers that have the adapter, by their names in the base."""
    named = model.get_base_model().named_modules()
    return {name: layer for name, layer in named if adapter in getattr(layer, "lora_A", {})}


def factors(model: Any, adapter: str = "soup") -> dict[str, tuple[Matrix, Matrix]]:
    return {
        name: tuple(part[adapter].weight.detach().double().cpu().numpy() for part in (layer.lora_A, layer.lora_B))
        for name, layer in layers(model, adapter).items()
    }


def state(model: Any) -> dict[str, bytes]:
    return {name: value.cpu().numpy().tobytes() for name, value in model.state_dict().items() if "lora_" in name}
