"""What experts have at the layers of a loaded model: checked against it, and read.

O out features, I in features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from personalized_soups.adapters.compatible import disagreements, strangers
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.placement import place
from personalized_soups.bank.expert_bank import ExpertBank, StackedModule
from personalized_soups.errors import IncompatibleExpertsError, SoupError, UnsupportedAdapterError, choose_from
from personalized_soups.merging.computing.dora import Dora, turned
from personalized_soups.merging.planning.checks import faults_of, raise_all
from personalized_soups.mixing.gates import Gates
from personalized_soups.mixing.layer import MixedLinear
from personalized_soups.mixing.stack import Member

_MAX_SHOWN = 5


def check_experts(experts: Sequence[Expert], model: nn.Module, gates: Gates, *, same_base: bool) -> None:
    """Raise if an expert is damaged, cannot be mixed, or does not fit the others or the model.

    Args:
        experts: all that the model shall have.
        model: the base, its layers bare or mixed already.
        gates: of the model.
        same_base: take it that all experts have one base, whatever their names and fingerprints say.

    Raises:
        SoupError: naming the expert and what is wrong; all faults of one kind of step at once.
    """
    raise_all([fault for expert in experts for fault in faults_of(expert)])
    raise_all([fault for expert in experts for fault in _unmixable(expert)])
    raise_all([*disagreements(experts, same_base=same_base)])
    raise_all([fault for expert in experts for fault in _unfit(expert, model, gates)])


def check_known_base(experts: Sequence[Expert], base: Path | str) -> None:
    """Raise if an expert records the fingerprint of another base than this folder or hub id.

    Raises:
        IncompatibleExpertsError: naming every such expert.
    """
    if any(expert.base.fingerprint is not None for expert in experts):
        raise_all(strangers(experts, base_fingerprint(base), str(base)))


class Members:
    """What experts have at each module of a model, read when it is asked for; may be read on several threads.

    Args:
        experts: checked.
        model: the base, in its layers' own dtypes; DoRA's D is computed from them.
        gates: of the model.
        dtype: of the factors; DoRA's are float32.
    """

    def __init__(self, experts: Sequence[Expert], model: nn.Module, gates: Gates, dtype: torch.dtype) -> None:
        self._bank = ExpertBank(experts)
        self._dtype = dtype
        self._dora = _dora(self._bank, model, gates)
        self._biases = {
            (index, each.module): each
            for index, expert in enumerate(experts)
            for each in expert.adapter.trained.values()
            if each.kind == "added"
        }
        self.modules = frozenset(self._bank.modules)

    def of(self, module: str) -> list[Member]:
        """Return what the experts have at a module, in their order; plain factors may share the files' pages.

        Raises:
            InputError: naming file and tensor where a value is NaN or infinite (in the dtype).
            UnsupportedAdapterError: where an expert has DoRA on a quantised layer.
        """
        bank, dora = self._bank, self._dora
        indices = bank.members(module)
        has_gains = dora is not None and any((index, module) in dora.magnitudes for index in indices)
        kind = torch.float32 if has_gains else self._dtype
        factors = tuple(bank.factors(index, module, kind) for index in indices)
        stack = StackedModule(module, indices, factors, tuple(range(len(indices))))
        gains: Mapping[int, Tensor] = dora.gains(stack) if dora is not None and has_gains else {}
        found = []
        for index, each in zip(indices, turned(stack, gains).factors, strict=True):
            gain_O, bias = gains.get(index), self._biases.get((index, module))
            adapter = bank.experts[index].adapter
            found.append(
                Member(
                    expert=bank.experts[index].name,
                    factors=each,
                    gain_O=None if gain_O is None else gain_O - 1,
                    bias_O=None if bias is None else adapter.trained_tensor(bias.name),
                )
            )
        return found


def bare_layer(model: nn.Module, name: str, gates: Gates) -> Any:
    """Return the base's own layer of that name, whether it is wrapped (with these gates) or not; None without one."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        return None
    return layer.base_layer if isinstance(layer, MixedLinear) and layer.gates is gates else layer


class _LiveTensors:
    """The weights of a loaded model's layers, by their names in the base."""

    def __init__(self, model: nn.Module, gates: Gates, experts: Sequence[Expert]) -> None:
        self._model = model
        self._gates = gates
        self._experts = experts

    def tensor(self, name: str) -> Tensor:
        """Return a layer's weight.

        Raises:
            UnsupportedAdapterError: if it is held quantised.
        """
        layer = bare_layer(self._model, name.removesuffix(".weight"), self._gates)
        weight: Tensor = layer.weight.detach()
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UnsupportedAdapterError(
                f"{name} is quantised, and DoRA scales the base's outputs by the norms of its weights",
                where=", ".join(str(expert.folder) for expert in self._experts if expert.adapter.config.use_dora),
                mend="load the base as it was before it was quantised, or leave this expert out",
            )
        return weight


def _dora(bank: ExpertBank, model: nn.Module, gates: Gates) -> Dora | None:
    if not any(each.kind == "magnitude" for expert in bank.experts for each in expert.adapter.trained.values()):
        return None
    tensors = _LiveTensors(model, gates, bank.experts)
    shapes = {}
    modules: dict[str, LoraModule] = {}
    for expert in bank.experts:
        for name, module in expert.adapter.modules.items():
            modules.setdefault(name, module)
            shapes[module.base_name] = tuple(bare_layer(model, name, gates).weight.shape)
    placements, _ = place(modules.values(), shapes)
    return Dora(bank, tensors, {name: (each.base_name, each) for name, each in placements.items()})


def _unmixable(expert: Expert) -> list[SoupError]:
    found = [
        f"{module.name} is no linear layer of its own ({module.kind})"
        for module in expert.adapter.modules.values()
        if module.kind not in {"linear", "transposed"} or module.base_name != f"{module.name}.weight"
    ]
    found += [
        f"{module.name} is given the tokens that a router sends to it"
        for module in expert.adapter.modules.values()
        if module.kind in {"linear", "transposed"} and ".experts." in module.name
    ]
    found += [
        f"{whole.name} is trained whole ({whole.origin})"
        for whole in expert.adapter.trained.values()
        if whole.kind not in {"added", "magnitude"}
    ]
    if not found:
        return []
    return [
        UnsupportedAdapterError(
            f"expert {expert.name!r} cannot be mixed on the fly: " + _few(found),
            where=str(expert.folder),
            mend="merge it instead (psoups merge), or leave this expert out",
        )
    ]


def _unfit(expert: Expert, model: nn.Module, gates: Gates) -> list[SoupError]:
    found: list[str] = []
    first: dict[int, str] = {}
    for module in expert.adapter.modules.values():
        layer = bare_layer(model, module.name, gates)
        want = (module.out_features, module.in_features)
        if layer is None:
            nearest = f" ({choose_from(module.name, _layers(model))})" if len(found) < _MAX_SHOWN else ""
            found.append(f"{module.name} is missing{nearest}")
        elif (other := first.setdefault(id(layer), module.name)) != module.name:
            found.append(f"{other} and {module.name} are one layer of the model")
        elif isinstance(layer, MixedLinear):
            found.append(f"{module.name} is wrapped by another SoupModel: unload() that one first")
        elif (shape := _shape(layer)) is not None and shape != want:
            found.append(f"{module.name} is {list(shape)}, the expert adapts {list(want)}")
        elif shape is None and not hasattr(layer, "weight"):
            found.append(f"{module.name} is a {type(layer).__name__}")
    if not found:
        return []
    return [
        IncompatibleExpertsError(
            f"expert {expert.name!r} does not fit the model: " + _few(found),
            where=str(expert.folder),
            mend="give the base that it was trained on",
        )
    ]


def _layers(model: nn.Module) -> list[str]:
    """Return the names of the layers that hold weights of their own."""
    return [name for name, each in model.named_modules() if name and getattr(each, "weight", None) is not None]


def _shape(layer: Any) -> tuple[int, int] | None:
    """Return a layer's out and in features, as it says them itself: a quantised weight has another shape."""
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return int(layer.out_features), int(layer.in_features)
    if type(layer).__name__ == "Conv1D":  # transformers' own, of GPT-2 and its kin: [I, O]
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    return None


def _few(found: Sequence[str]) -> str:
    more = f" (and {len(found) - _MAX_SHOWN} more)" if len(found) > _MAX_SHOWN else ""
    return "; ".join(found[:_MAX_SHOWN]) + more
