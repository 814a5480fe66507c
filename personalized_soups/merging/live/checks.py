"""Checks of the experts before a live soup is built, and of the model before the soup is attached."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from personalized_soups.adapters.library import Expert
from personalized_soups.errors import IncompatibleExpertsError, UnsupportedAdapterError, UsageError
from personalized_soups.merging.planning.plan import MergePlan

_MAX_SHOWN = 5


def check_plain(experts: Sequence[Expert]) -> None:
    """Check that all experts have only low-rank factors of linear layers.

    Raises:
        UnsupportedAdapterError: if an expert has another tensor. The error names the expert and its first such tensor.
    """
    for expert in experts:
        for module in expert.adapter.modules.values():
            if module.kind != "linear":
                raise _unsupported(expert, f"adapts {module.name}, which is a module of the kind {module.kind}")
        for whole in expert.adapter.trained.values():
            raise _unsupported(expert, f"has the tensor {whole.name}, which is trained whole ({whole.origin})")


def check_model(base: nn.Module, plan: MergePlan, device: torch.device) -> None:
    """Check that the model has all linear layers that the experts adapt, in the same shapes and on `device`.

    Raises:
        IncompatibleExpertsError: if layers are missing or have other shapes. The error names these layers.
        UsageError: if a layer is on another device.
    """
    layers = dict(base.named_modules())
    faults = []
    for module in plan.modules:
        layer: Any = layers.get(module.name)
        shape = None if layer is None else (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if shape is None:
            faults.append(f"{module.name} is missing from the model")
        elif shape != (module.out_features, module.in_features):
            described = f"has the shape {list(shape)}" if None not in shape else f"is of type {type(layer).__name__}"
            expected = [module.out_features, module.in_features]
            faults.append(f"{module.name} {described}; the experts adapt a linear layer of shape {expected}")
        elif layer.weight.device != device:
            raise UsageError(
                f"{module.name} is on {layer.weight.device}, but the live soup is on {device}",
                where="model",
                mend="move the model before you attach the soup: model.to(live.device)",
            )
    if faults:
        more = f" (and {len(faults) - _MAX_SHOWN} more)" if len(faults) > _MAX_SHOWN else ""
        raise IncompatibleExpertsError(
            "the model does not fit the experts: " + "; ".join(faults[:_MAX_SHOWN]) + more,
            where=", ".join(expert.name for expert in plan.experts),
            mend="load the base model that the experts were trained on, and attach the soup to that model",
        )


def _unsupported(expert: Expert, what: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"the expert {expert.name!r} {what}; a live soup can only hold low-rank factors of linear layers",
        where=str(expert.folder),
        mend="merge the experts instead, or leave this expert out",
    )
