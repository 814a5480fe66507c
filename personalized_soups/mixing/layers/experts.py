"""Check experts against a loaded model, and read their tensors for its layers.

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
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.mixed_linear import MixedLinear
from personalized_soups.mixing.layers.stack import Member

# The most problems of one expert that an error lists.
_MAX_SHOWN = 5


def check_experts(experts: Sequence[Expert], model: nn.Module, gates: Gates, *, same_base: bool) -> None:
    """Raise if an expert is damaged, cannot be mixed, or does not fit the other experts or the model.

    Args:
        experts: all experts that the model is to have.
        model: the base; its layers may be wrapped already.
        gates: of the model.
        same_base: accept any names and fingerprints of bases that the experts record.

    Raises:
        SoupError: with all problems that one kind of check finds.
    """
    # In this order, each kind of check may rely on the ones before it. Headers only: no tensor is read.
    raise_all([fault for expert in experts for fault in faults_of(expert)])
    raise_all([fault for expert in experts for fault in _unmixable(expert)])
    raise_all([*disagreements(experts, same_base=same_base)])
    raise_all([fault for expert in experts for fault in _unfit(expert, model, gates)])


def check_known_base(experts: Sequence[Expert], base: Path | str) -> None:
    """Raise if an expert records the fingerprint of another base.

    Args:
        experts: the experts.
        base: the folder or hub id of the base.

    Raises:
        IncompatibleExpertsError: with the names of all such experts.
    """
    # Hashing the base takes time, so it is done only if an expert records a fingerprint.
    if any(expert.base.fingerprint is not None for expert in experts):
        raise_all(strangers(experts, base_fingerprint(base), str(base)))


class Members:
    """The tensors of experts at each module of a model, read on demand. Safe for use by several threads.

    Attributes:
        modules: the names of all modules that an expert adapts.

    Args:
        experts: checked experts.
        model: the base; DoRA's D is computed from its weights.
        gates: of the model.
        dtype: of the factors. Factors with DoRA are float32, because D multiplies B before it is rounded.
    """

    def __init__(self, experts: Sequence[Expert], model: nn.Module, gates: Gates, dtype: torch.dtype) -> None:
        self._bank = ExpertBank(experts)
        self._dtype = dtype
        self._dora = _dora(self._bank, model, gates)
        self._biases = {
            (index, tensor.module): tensor
            for index, expert in enumerate(experts)
            for tensor in expert.adapter.trained.values()
            if tensor.kind == "added"
        }
        self.modules = frozenset(self._bank.modules)

    def of(self, module: str) -> list[Member]:
        """Return the tensors of each expert at a module, in the experts' order. Plain factors may be memory-mapped.

        Raises:
            InputError: with file and tensor, if a value is NaN or infinite in the dtype.
            UnsupportedAdapterError: if an expert has DoRA on a quantised layer.
        """
        bank, dora = self._bank, self._dora
        indices = bank.members(module)
        # D multiplies the sum of base and delta, so a layer with DoRA needs a gain for W x, too.
        has_gains = dora is not None and any((index, module) in dora.magnitudes for index in indices)
        dtype = torch.float32 if has_gains else self._dtype
        factors = tuple(bank.factors(index, module, dtype) for index in indices)
        stack = StackedModule(module, indices, factors, tuple(range(len(indices))))
        # D is the magnitude over the norm of W + delta, which depends on the base of this model.
        gains: Mapping[int, Tensor] = dora.gains(stack) if dora is not None and has_gains else {}
        members = []
        for index, turned_factors in zip(indices, turned(stack, gains).factors, strict=True):
            gain_O, bias = gains.get(index), self._biases.get((index, module))
            adapter = bank.experts[index].adapter
            members.append(
                Member(
                    expert=bank.experts[index].name,
                    factors=turned_factors,
                    # D - 1 and not D: an expert with weight 0 must add nothing.
                    gain_O=None if gain_O is None else gain_O - 1,
                    bias_O=None if bias is None else adapter.trained_tensor(bias.name),
                )
            )
        return members


def bare_layer(model: nn.Module, name: str, gates: Gates) -> Any:
    """Return the base's own layer of that name, wrapped with these gates or not; None if there is no such layer."""
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
            UnsupportedAdapterError: if the weight is quantised.
        """
        layer = bare_layer(self._model, name.removesuffix(".weight"), self._gates)
        weight: Tensor = layer.weight.detach()
        # 8-bit floats are quantised, too: their numbers need scales that are stored elsewhere.
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UnsupportedAdapterError(
                f"{name} is quantised, but DoRA needs the norms of the base's weights",
                where=", ".join(str(expert.folder) for expert in self._experts if expert.adapter.config.use_dora),
                mend="load the base without quantisation, or leave this expert out",
            )
        return weight


def _dora(bank: ExpertBank, model: nn.Module, gates: Gates) -> Dora | None:
    # Without DoRA the base's weights are not touched at all.
    if not any(tensor.kind == "magnitude" for expert in bank.experts for tensor in expert.adapter.trained.values()):
        return None
    tensors = _LiveTensors(model, gates, bank.experts)
    shapes = {}
    modules: dict[str, LoraModule] = {}
    for expert in bank.experts:
        for name, module in expert.adapter.modules.items():
            modules.setdefault(name, module)
            shapes[module.base_name] = tuple(bare_layer(model, name, gates).weight.shape)
    placements, _ = place(modules.values(), shapes)
    return Dora(bank, tensors, {name: (module.base_name, module) for name, module in placements.items()})


def _unmixable(expert: Expert) -> list[SoupError]:
    problems = [
        f"{module.name} is not a linear layer of its own ({module.kind})"
        for module in expert.adapter.modules.values()
        if module.kind not in {"linear", "transposed"} or module.base_name != f"{module.name}.weight"
    ]
    # A router gives an expert layer a list of tokens without saying from which rows they are.
    problems += [
        f"{module.name} gets only the tokens that a router sends to it"
        for module in expert.adapter.modules.values()
        if module.kind in {"linear", "transposed"} and ".experts." in module.name
    ]
    # A whole tensor is not a low-rank change, so no gate can weigh it by row.
    problems += [
        f"{whole.name} is trained whole ({whole.origin})"
        for whole in expert.adapter.trained.values()
        if whole.kind not in {"added", "magnitude"}
    ]
    if not problems:
        return []
    return [
        UnsupportedAdapterError(
            f"expert {expert.name!r} cannot be mixed on the fly: " + _first_few(problems),
            where=str(expert.folder),
            mend="merge it instead (psoups merge), or leave this expert out",
        )
    ]


def _unfit(expert: Expert, model: nn.Module, gates: Gates) -> list[SoupError]:
    problems: list[str] = []
    # The first module of each layer, by the layer's identity: tied modules are one layer under two names.
    first: dict[int, str] = {}
    for module in expert.adapter.modules.values():
        layer = bare_layer(model, module.name, gates)
        want = (module.out_features, module.in_features)
        if layer is None:
            # A suggestion compares the name with every layer, so it is made only for the problems that are shown.
            nearest = f" ({choose_from(module.name, _layers(model))})" if len(problems) < _MAX_SHOWN else ""
            problems.append(f"{module.name} is missing{nearest}")
        elif (earlier := first.setdefault(id(layer), module.name)) != module.name:
            problems.append(f"{earlier} and {module.name} are one layer of the model")
        # Its gates are another model's: two mixtures would be added to one output.
        elif isinstance(layer, MixedLinear):
            problems.append(f"{module.name} is wrapped by another SoupModel: call its unload() first")
        elif (shape := _shape(layer)) is not None and shape != want:
            problems.append(f"{module.name} has shape {list(shape)}, but the expert adapts {list(want)}")
        elif shape is None and not hasattr(layer, "weight"):
            problems.append(f"{module.name} is a {type(layer).__name__}")
    if not problems:
        return []
    return [
        IncompatibleExpertsError(
            f"expert {expert.name!r} does not fit the model: " + _first_few(problems),
            where=str(expert.folder),
            mend="give the base that it was trained on",
        )
    ]


def _layers(model: nn.Module) -> list[str]:
    """Return the names of all modules with a weight."""
    return [name for name, module in model.named_modules() if name and getattr(module, "weight", None) is not None]


def _shape(layer: Any) -> tuple[int, int] | None:
    """Return a layer's declared out and in features, because a quantised weight has another shape."""
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return int(layer.out_features), int(layer.in_features)
    if type(layer).__name__ == "Conv1D":  # transformers' class in models like GPT-2; its weight is [I, O]
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    return None


def _first_few(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - _MAX_SHOWN} more)" if len(problems) > _MAX_SHOWN else ""
    return "; ".join(problems[:_MAX_SHOWN]) + more
