"""Decide which layers of a model form groups, and form them again when the model or its experts change.

The layers of a group read the same input and share one matrix product (`groups.py`).

Shapes: C = rows of the distinct A's, I = in_features.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from personalized_soups.launching.threads import in_order, num_workers
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.groups import FactorGroup, LayerGroup
from personalized_soups.mixing.layers.stack import Stack
from personalized_soups.mixing.layers.weight_group import WeightGroup, is_hooked

if TYPE_CHECKING:
    from personalized_soups.mixing.layers.mixed_linear import MixedLinear

# Names of layers that read the same input, in the order in which transformers' models call them. A wrong row costs
# time, but the results stay correct: a layer with another input than the other layers computes its own product.
_READ_ALIKE = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)

# The maximum number of weight elements that a group moves into its buffer on a CPU. The embedded base is below this
# limit. For a base of 1B parameters, one product for weights and A's was no faster than two products
# (docs/explanation/decisions.md). Moving its weights takes 5 seconds, and copies memory-mapped weights into memory.
_MOST_NUMBERS_ON_CPU = 1 << 20


class LayerGroups:
    """The groups of a model's layers.

    Attributes:
        slots: for each product, the slots of the layers that it computes, in the order of the gates' columns. A layer
            without a group has its own product.

    Args:
        model: a model of transformers.
        gates: the gates of the model.
    """

    def __init__(self, model: Any, gates: Gates) -> None:
        self.slots: list[list[int]] = []
        self._model = model
        self._gates = gates
        self._groups: list[LayerGroup] = []

    @property
    def num_spare_bytes(self) -> int:
        """The size in bytes of the parts of the groups' buffers that hold neither weights nor factors."""
        return sum(group.num_spare_bytes for group in self._groups)

    def is_current(self) -> bool:
        """Return whether every group has the same result as its layers would have separately."""
        return all(group.is_current() for group in self._groups)

    def clear(self) -> None:
        """Drop all groups from this object, but do not dissolve them: their layers keep using them."""
        self._groups.clear()

    def dissolve_of(self, layers: set[MixedLinear]) -> None:
        """Dissolve the groups that contain one of these layers."""
        for group in self._groups:
            if not layers.isdisjoint(group.layers):
                group.dissolve()
        self._groups = [group for group in self._groups if layers.isdisjoint(group.layers)]

    def regroup(self, layers: Mapping[str, MixedLinear]) -> tuple[dict[str, MixedLinear], int]:
        """Form groups of these layers, keep the groups that are still correct, and give all layers their slots.

        Slots depend only on the names of the layers, because a mixture that is set has a weight for each slot.

        Returns:
            The layers in the order of their slots, and the number of groups that could not be formed because memory
            ran out.
        """
        # Names decide which layers form a group. In each forward pass, they share a product only if they get the same
        # input tensor.
        names = in_slot_order(layers)
        candidates = [candidate for alike in names for candidate in candidate_groups([layers[name] for name in alike])]
        # A tensor that is created in inference mode can be neither changed nor trained outside of it.
        with torch.inference_mode(False), torch.no_grad():
            # A group with the same layers is kept, because the base's weights must not move when experts change.
            kept = {group.layers: group for group in self._groups if group.has_these_bases()}
            for group in self._groups:
                if group.layers not in candidates or group.layers not in kept:
                    group.dissolve()
            self._groups = [kept[candidate] for candidate in candidates if candidate in kept]
            num_failed = self._form(candidates, kept)
        ordered = {name: layers[name] for alike in names for name in alike}
        # The layers of a group have consecutive slots, so a group's gates are one block of columns.
        for slot, layer in enumerate(ordered.values()):
            layer.slot = slot
        self.slots = [[layer.slot for layer in candidate] for candidate in candidates]
        return ordered, num_failed

    def _form(
        self, candidates: Sequence[tuple[MixedLinear, ...]], kept: Mapping[tuple[MixedLinear, ...], LayerGroup]
    ) -> int:
        """Form the missing groups, and make the kept groups store new stacks. Return how many groups failed."""
        storages = storage_counts(self._model)

        def formed(candidate: tuple[MixedLinear, ...]) -> LayerGroup | RuntimeError | None:
            group = kept.get(candidate)
            try:
                if group is None:
                    return new_group(candidate, self._gates, storages)
                if not group.has_these_stacks():
                    group.hold()
            except RuntimeError as error:  # torch raises it if memory runs out, on a CPU and on a GPU
                if group is not None:
                    group.dissolve()
                return error
            return group

        # On a GPU, only the caller's thread is used, because other threads have other current streams.
        is_on_gpu = any(layer.stack.a_CI.is_cuda for candidate in candidates for layer in candidate)
        results = list(in_order(formed, candidates, 1 if is_on_gpu else num_workers(torch.device("cpu"))))
        if is_on_gpu:
            torch.cuda.empty_cache()  # frees the memory in which the weights were before they moved
        self._groups = [result for result in results if isinstance(result, LayerGroup)]
        return sum(isinstance(result, RuntimeError) for result in results)


def in_slot_order(names: Collection[str]) -> list[list[str]]:
    """Return the names of layers in the order of their slots. Names of layers that may share an input are in one list.

    Such layers have the same parent module, and names that `_READ_ALIKE` lists together.
    """
    alike: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        leaves = next((row for row in _READ_ALIKE if leaf in row), (leaf,))
        alike.setdefault((parent, leaves), []).append(name)
    return [
        sorted(own, key=lambda name, leaves=leaves: leaves.index(name.rpartition(".")[2]))  # type: ignore[misc]
        for (_, leaves), own in alike.items()
    ]


def candidate_groups(layers: Sequence[MixedLinear]) -> list[tuple[MixedLinear, ...]]:
    """Split layers that may read the same input into one candidate for a group, and each other layer as its own tuple.

    The layers of the group have plain stacks, and the same in_features, dtype and device.
    """

    def kind(layer: MixedLinear) -> tuple[int, torch.dtype, torch.device]:
        a_CI = layer.stack.a_CI
        return a_CI.shape[1], a_CI.dtype, a_CI.device

    # A stack is plain without DoRA, which scales W x, and without lora_bias, which adds columns to the gates.
    plain = [layer for layer in layers if _is_plain_stack(layer.stack)]
    together = tuple(layer for layer in plain if kind(layer) == kind(plain[0]))
    alone = [(layer,) for layer in layers if layer not in together]
    return [together, *alone] if together else list(alone)


def new_group(candidate: Sequence[MixedLinear], gates: Gates, storages: Mapping[int, int]) -> LayerGroup | None:
    """Return a new group of the layers; None if a group would not be faster than separate layers.

    Args:
        candidate: one of the tuples that `candidate_groups` returns.
        gates: the gates of the model.
        storages: the result of `storage_counts` for the model.

    Raises:
        RuntimeError: if memory runs out. The layers are then the same as before.
    """
    if not _is_plain_stack(candidate[0].stack):
        return None
    group: LayerGroup
    if takes_weights(candidate, storages):
        # The weights move first, because `hold` writes the A's behind them.
        group = weights = WeightGroup(candidate, gates)
        weights.move_weights()
    elif len(candidate) > 1:
        group = FactorGroup(candidate, gates)
    else:
        return None
    try:
        group.hold()
    except RuntimeError:
        group.dissolve()
        raise
    group.join()
    return group


def takes_weights(layers: Sequence[MixedLinear], storages: Mapping[int, int]) -> bool:
    """Return whether a group of these layers should move the base's weights into its buffer.

    Args:
        layers: one of the tuples that `candidate_groups` returns.
        storages: the result of `storage_counts` for the model.
    """
    if not all(is_plain_linear(layer.base_layer, layer.stack.a_CI, storages) for layer in layers):
        return False
    # On a GPU the weights always move, because the number of kernel launches decides the time of a decode step.
    num_numbers = sum(layer.weight.numel() for layer in layers)
    return layers[0].stack.a_CI.is_cuda or num_numbers <= _MOST_NUMBERS_ON_CPU


def is_plain_linear(base: nn.Module, like: Tensor, storages: Mapping[int, int]) -> bool:
    """Return whether a layer computes only x W^T + b, and its parameters may move into another buffer.

    The layer must be exactly an `nn.Linear`, without hooks, parametrization, or wrapping by PEFT or accelerate. Its
    parameters must have the dtype and device of `like`, must not be sharded or on the meta device, and must own their
    storage: a weight that is tied to another weight, or is part of a memory-mapped file, must not move.
    """
    if type(base) is not nn.Linear or is_hooked(base):
        return False
    tensors = [tensor for tensor in base._parameters.values() if tensor is not None]
    return all(_may_move(tensor, like, storages) for tensor in tensors)


def storage_counts(model: nn.Module) -> Counter[int]:
    """Return how often each storage occurs among a model's parameters and buffers, by the storage's address.

    A parameter with several names counts once for each name.
    """
    named: Iterable[tuple[str, Tensor]] = (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    )
    # Subclasses of Tensor are left out, because they may have no storage with an address.
    tensors = (tensor for _, tensor in named if type(tensor.data) is Tensor and not tensor.is_meta)
    return Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)


def _may_move(tensor: nn.Parameter, like: Tensor, storages: Mapping[int, int]) -> bool:
    """Return whether a parameter may become a view of another buffer. `is_plain_linear` lists the conditions."""
    is_usual = type(tensor) is nn.Parameter and type(tensor.data) is Tensor and not tensor.is_inference()
    if not is_usual or tensor.is_meta or (tensor.dtype, tensor.device) != (like.dtype, like.device):
        return False
    storage = tensor.untyped_storage()
    is_alone = storage.nbytes() == tensor.nbytes and storages.get(storage.data_ptr(), 0) == 1
    # `is_shared` is true for every CUDA tensor.
    return is_alone and tensor.is_contiguous() and (tensor.is_cuda or not tensor.is_shared())


def _is_plain_stack(stack: Stack) -> bool:
    return stack.gains_DO is None and stack.biases_DO is None
