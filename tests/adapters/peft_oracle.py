"""PEFT as the oracle: random adapters on tiny models, saved, and merged by PEFT itself."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.placement import add_parts, place, scale_outputs, squared_norms
from personalized_soups.adapters.trained import TrainedTensor

Tensors = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Saved:
    """A base, an adapter folder on it, and what PEFT makes of the two."""

    folder: Path
    base: Tensors
    merged: Tensors


def saved(folder: Path, model: nn.Module, *, seed: int = 0, **config: Any) -> Saved:
    """Wrap a model with random (never zero) adapter weights, save the adapter and merge it by PEFT, in float32."""
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # PEFT remarks on tied weights, fan_in_fan_out, saved embeddings
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 6, **config}))
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.data.add_(0.2 * torch.randn_like(parameter))  # in place: tied ones stay tied
        wrapped.save_pretrained(str(folder))
        merged = wrapped.merge_and_unload().state_dict()
    return Saved(folder, base, {name: tensor.clone() for name, tensor in merged.items()})


def reloaded(folder: Path, model: nn.Module) -> Tensors:
    """Return what PEFT makes of a base and an adapter folder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: Tensors = PeftModel.from_pretrained(model, str(folder)).merge_and_unload().state_dict()
    return merged


def rebuilt(folder: Path, base: Tensors) -> Tensors:
    """Return what one expert of weight 1 makes of a base, by the package's reading of its folder, in float64."""
    adapter = LoraAdapter.open(folder)
    result = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in base.items()}
    for trained in adapter.trained.values():
        _train(result, trained, adapter.trained_tensor(trained.name, torch.float64))
    placements, faults = place(adapter.modules.values(), {name: tensor.shape for name, tensor in base.items()})
    assert not faults
    assert placements.keys() == adapter.modules.keys()
    magnitudes = {each.module: each for each in adapter.trained.values() if each.kind == "magnitude"}
    for name, placement in placements.items():
        factors = adapter.factors(name, torch.float64)
        matrix = result[placement.base_name].reshape(placement.matrix_shape)
        # in blocks of rows, as a merge does
        for start in range(0, len(matrix), 5):
            add_parts(matrix[start : start + 5], placement.parts(factors), factors.scaling, start)
        if name in magnitudes:
            norms = squared_norms(matrix, placement.output_axis).sqrt()
            magnitude = adapter.trained_tensor(magnitudes[name].name, torch.float64)
            scale_outputs(matrix, magnitude / norms, placement.output_axis)
    return result


def _train(result: Tensors, trained: TrainedTensor, value: Tensor) -> None:
    if trained.kind == "added":
        result[trained.target] += trained.scaling * value
    elif trained.kind == "replaced":
        assert result[trained.target].shape == value.shape
        result[trained.target] = value.clone()
    elif trained.kind == "rows":
        result[trained.target][list(trained.rows)] = value
