"""Check whether experts fit a loaded model, and read their tensors for its layers.

DoRA scales each output of a layer: D is the magnitude over the norm of the merged weight, one number for each output.

Shapes: O = out_features, I = in_features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from personalized_soups.adapters.compatible import disagreements, strangers, unlike
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.modules import LoraModule
from personalized_soups.adapters.placement import place
from personalized_soups.adapters.provenance import BaseAdapterRecord
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
    """Check that no expert is damaged, and that all experts can be mixed and fit each other and the model.

    Args:
        experts: all experts that the model will hold.
        model: the base, whose layers may be wrapped already.
        gates: the gates of the model.
        same_base: accept the experts whatever base names and fingerprints they record.

    Raises:
        SoupError: if a check fails. The error lists all problems that this check found.
    """
    # Each check relies on the checks before it. Only file headers are read, no tensors.
    raise_all([fault for expert in experts for fault in faults_of(expert)])
    raise_all([fault for expert in experts for fault in _unmixable(expert)])
    raise_all([*disagreements(experts, same_base=same_base)])
    raise_all([fault for expert in experts for fault in _unfit(expert, model, gates)])


def check_known_base(experts: Sequence[Expert], base: Path | str) -> None:
    """Check that no expert records the fingerprint of another base.

    Args:
        experts: the experts.
        base: the folder or hub id of the base.

    Raises:
        IncompatibleExpertsError: if an expert records another fingerprint. The error names all such experts.
    """
    # Hashing the base takes time, so the base is hashed only if an expert records a fingerprint.
    if any(expert.base.fingerprint is not None for expert in experts):
        raise_all(strangers(experts, base_fingerprint(base), str(base)))


def check_known_adapter(experts: Sequence[Expert], on: BaseAdapterRecord | None) -> None:
    """Check that no expert records another base adapter than that of the model.

    Args:
        experts: the experts.
        on: the adapter that the model's weights include, or None.

    Raises:
        IncompatibleExpertsError: if an expert records another adapter. The error names all such experts.
    """
    # an expert whose records are damaged is reported by `check_experts`
    raise_all([fault for expert in experts for fault in faults_of(expert)])
    raise_all([*unlike(experts, on)])


class Members:
    """Reads the tensors of experts for each module of a model. Several threads may use one object.

    Attributes:
        modules: the names of all modules that an expert adapts.

    Args:
        experts: the experts, already checked.
        model: the base, from whose weights DoRA's D is computed.
        gates: the gates of the model.
        dtype: the dtype of the factors. At modules with DoRA, the factors are float32, because B is multiplied by D
            before it is rounded.
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
        """Return the tensors of each expert that adapts a module, in the order of the experts.

        Factors without DoRA may be views of memory-mapped files.

        Raises:
            InputError: if a value is NaN or infinite in the dtype. The error names the file and the tensor.
            UnsupportedAdapterError: if an expert has DoRA on a quantized layer.
        """
        bank, dora = self._bank, self._dora
        indices = bank.members(module)
        # D multiplies the sum of base weight and delta, so with DoRA the base's product W x needs a gain, too.
        has_gains = dora is not None and any((index, module) in dora.magnitudes for index in indices)
        dtype = torch.float32 if has_gains else self._dtype
        factors = tuple(bank.factors(index, module, dtype) for index in indices)
        stack = StackedModule(module, indices, factors, tuple(range(len(indices))))
        # The norm in D is that of W + delta, so D depends on the base weight W of this model.
        gains: Mapping[int, Tensor] = dora.gains(stack) if dora is not None and has_gains else {}
        members = []
        for index, turned_factors in zip(indices, turned(stack, gains).factors, strict=True):
            gain_O, bias = gains.get(index), self._biases.get((index, module))
            adapter = bank.experts[index].adapter
            members.append(
                Member(
                    expert=bank.experts[index].name,
                    factors=turned_factors,
                    # The gain is D - 1, because an expert with weight 0 must add nothing.
                    gain_O=None if gain_O is None else gain_O - 1,
                    bias_O=None if bias is None else adapter.trained_tensor(bias.name),
                )
            )
        return members


def bare_layer(model: nn.Module, name: str, gates: Gates) -> Any:
    """Return the base's own layer of that name; None if there is no such layer.

    If the layer is wrapped with `gates`, the layer within the wrapper is returned. A layer that another SoupModel has
    wrapped is returned with its wrapper.
    """
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
            UnsupportedAdapterError: if the weight is quantized.
        """
        layer = bare_layer(self._model, name.removesuffix(".weight"), self._gates)
        weight: Tensor = layer.weight.detach()
        # Weights in 8-bit floats are quantized, too: their scales are stored elsewhere.
        if not weight.is_floating_point() or weight.dtype.itemsize < 2:
            raise UnsupportedAdapterError(
                f"{name} is quantized, but DoRA needs the norms of the base's weights",
                where=", ".join(str(expert.folder) for expert in self._experts if expert.adapter.config.use_dora),
                mend="load the base without quantization_config, or leave out the experts with DoRA",
            )
        return weight


def _dora(bank: ExpertBank, model: nn.Module, gates: Gates) -> Dora | None:
    # Without DoRA, the base's weights are never read.
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
        f"{module.name} is not a separate linear layer (its kind is {module.kind})"
        for module in expert.adapter.modules.values()
        if module.kind not in {"linear", "transposed"} or module.base_name != f"{module.name}.weight"
    ]
    # In a mixture-of-experts model, a layer behind a router gets tokens, but not the numbers of their rows.
    problems += [
        f"{module.name} gets only the tokens that a router sends to it"
        for module in expert.adapter.modules.values()
        if module.kind in {"linear", "transposed"} and ".experts." in module.name
    ]
    # A tensor that is trained whole has no low-rank factors, so no gate can weight it for each row.
    problems += [
        f"{whole.name} is trained as a whole tensor ({whole.origin})"
        for whole in expert.adapter.trained.values()
        if whole.kind not in {"added", "magnitude"}
    ]
    if not problems:
        return []
    return [
        UnsupportedAdapterError(
            f"expert {expert.name!r} cannot be mixed on the fly: " + _first_few(problems),
            where=str(expert.folder),
            mend="merge this expert with psoups merge, or leave this expert out",
        )
    ]


def _unfit(expert: Expert, model: nn.Module, gates: Gates) -> list[SoupError]:
    problems: list[str] = []
    # The first name of each layer, by the layer's identity. Tied modules are one layer with two names.
    first: dict[int, str] = {}
    for module in expert.adapter.modules.values():
        layer = bare_layer(model, module.name, gates)
        want = (module.out_features, module.in_features)
        if layer is None:
            # A suggestion is slow, because it compares all names, so it is made only for problems that are shown.
            nearest = f" ({choose_from(module.name, _layers(model))})" if len(problems) < _MAX_SHOWN else ""
            problems.append(f"the model has no layer {module.name}{nearest}")
        elif (earlier := first.setdefault(id(layer), module.name)) != module.name:
            problems.append(f"{earlier} and {module.name} are two names of one layer, but the expert adapts both")
        # If two SoupModels wrapped one layer, the soups of both would be added to its output.
        elif isinstance(layer, MixedLinear):
            problems.append(f"{module.name} is wrapped by another SoupModel: call the unload() of that SoupModel first")
        elif (shape := _shape(layer)) is not None and shape != want:
            problems.append(f"{module.name} has shape {list(shape)}, but the expert adapts a layer of {list(want)}")
        elif shape is None and not hasattr(layer, "weight"):
            problems.append(f"{module.name} is of type {type(layer).__name__}, which has no weight")
    if not problems:
        return []
    return [
        IncompatibleExpertsError(
            f"expert {expert.name!r} does not fit the model: " + _first_few(problems),
            where=str(expert.folder),
            mend="load the base on which the expert was trained, or leave this expert out",
        )
    ]


def _layers(model: nn.Module) -> list[str]:
    """Return the names of all modules with a weight."""
    return [name for name, module in model.named_modules() if name and getattr(module, "weight", None) is not None]


def _shape(layer: Any) -> tuple[int, int] | None:
    """Return a layer's declared (out_features, in_features); None if the layer declares none.

    The shape of `weight` would not do, because a quantized weight is stored in another shape.
    """
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return int(layer.out_features), int(layer.in_features)
    if type(layer).__name__ == "Conv1D":  # a class of transformers in models like GPT-2, whose weight is [I, O]
        return int(layer.weight.shape[1]), int(layer.weight.shape[0])
    return None


def _first_few(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - _MAX_SHOWN} more)" if len(problems) > _MAX_SHOWN else ""
    return "; ".join(problems[:_MAX_SHOWN]) + more
