"""Whether experts and a model can have a live soup."""

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
    """Raise if an expert holds more than low-rank factors of linear layers.

    Raises:
        UnsupportedAdapterError: naming the expert and what it holds.
    """
    for expert in experts:
        for module in expert.adapter.modules.values():
            if module.kind != "linear":
                raise _unsupported(expert, f"{module.name} is of the kind {module.kind}")
        for whole in expert.adapter.trained.values():
            raise _unsupported(expert, f"{whole.name} is trained whole ({whole.origin})")


def check_model(base: nn.Module, plan: MergePlan, device: torch.device) -> None:
    """Raise unless a model has, on that device, every linear layer that the plan's experts adapt.

    Raises:
        IncompatibleExpertsError: naming the modules that are missing or of other shapes.
        UsageError: if a module is on another device.
    """
    layers = dict(base.named_modules())
    found = []
    for module in plan.modules:
        layer: Any = layers.get(module.name)
        shape = None if layer is None else (getattr(layer, "out_features", None), getattr(layer, "in_features", None))
        if shape is None:
            found.append(f"{module.name} is missing")
        elif shape != (module.out_features, module.in_features):
            described = list(shape) if None not in shape else f"a {type(layer).__name__}"
            found.append(f"{module.name} is {described}, the experts adapt {[module.out_features, module.in_features]}")
        elif layer.weight.device != device:
            raise UsageError(
                f"{module.name} is on {layer.weight.device}, the live soup on {device}",
                where="model",
                mend="move the model first: model.to(live.device)",
            )
    if found:
        more = f" (and {len(found) - _MAX_SHOWN} more)" if len(found) > _MAX_SHOWN else ""
        raise IncompatibleExpertsError(
            "the model does not fit the experts: " + "; ".join(found[:_MAX_SHOWN]) + more,
            where=", ".join(each.name for each in plan.experts),
            mend="attach to the base that they were trained on",
        )


def _unsupported(expert: Expert, what: str) -> UnsupportedAdapterError:
    return UnsupportedAdapterError(
        f"expert {expert.name!r}: {what}, a live soup holds only low-rank factors of linear layers",
        where=str(expert.folder),
        mend="merge instead, or leave this expert out",
    )
