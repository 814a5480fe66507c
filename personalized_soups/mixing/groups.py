"""Layers of a model that read the same input: one product for their weights and their experts' A's, one for their B's.

A layer by itself takes a product with its weight, one with A, the gate, and one with B: twelve calls for q, k and v. A
group takes one product `[Wq; Wk; Wv; Aq; Ak; Av] x`, one gate, and one kernel for all B's. On a GPU a decode step is
bound by the number of launches; on a CPU a small model is bound by the number of calls into torch.

G gates, N rows of the input, M rows of the group's buffer, C rows of the A's, K ranks of all its layers, P numbers of
all B's, I in features, O out features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from personalized_soups.kernels.add_gated import BlockDiagonal, add_gated
from personalized_soups.mixing.gates import Gates

if TYPE_CHECKING:
    from personalized_soups.mixing.layer import MixedLinear

# Names of layers that read the same input, in the order in which transformers' models call them. It is a guess: a layer
# that is given another input than its neighbours computes its own product, which is slower and just as right.
_READ_ALIKE = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("query", "key", "value"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("w1", "w3"),
    ("wi_0", "wi_1"),
)

# cuBLAS wants every layer's weight to begin at a multiple of so many bytes, and its outputs at one of so many columns.
_ALIGNED_BYTES = 256
_ALIGNED_COLUMNS = 16

# The A's are rows of the weights' buffer where they are at most this share of it, or so few numbers that only the
# number of calls counts. Beyond that they take a second product. A batch that uses less than half of the ranks takes
# none: each layer multiplies the experts that are used.
_ROOM = 1 / 8
_FEW_NUMBERS = 1 << 17

# On a CPU the weights of a group move into one buffer up to so many numbers, as in the embedded base. With the 1B base
# one product for weights and A's was no faster than two (docs/decisions.md), moving the weights takes 5 seconds, and a
# memory-mapped base would become private memory.
_MOST_NUMBERS_ON_CPU = 1 << 20


class HeldProduct:
    """What one product gave for the layers of a group, until each has taken its part.

    It holds its input, so that no other tensor can have the same identity meanwhile.
    """

    __slots__ = ("_group", "_parts", "_version", "_x", "num_left")

    def __init__(self, group: LayerGroup, x: Tensor, parts: Sequence[Tensor]) -> None:
        self._group = group
        self._x = x
        self._version = _version(x)
        self._parts: list[Tensor | None] = list(parts)
        self.num_left = len(parts)

    def take(self, group: LayerGroup, x: Tensor, place: int) -> Tensor | None:
        """Return a layer's part, once; None where this is the product of another group or of another input.

        An input that was changed in place is another one. Tensors made in inference mode do not count their changes: a
        model that changes its hidden states in place between two layers of one group gets the old product there.
        """
        if self._group is not group or self._x is not x or self._version != _version(x):
            return None
        part, self._parts[place] = self._parts[place], None
        if part is not None:
            self.num_left -= 1
        return part


class LayerGroup:
    """Layers of one parent that read the same input, and what they multiply it with while a mixture is set.

    Args:
        layers: wrapped ones of one device and dtype, without DoRA and lora_bias; their slots follow each other.
        gates: of the model.
        has_weights: hold the base's weights and biases too, which become views of the group's buffers. The layers'
            bases are then as `is_plain` says.
    """

    def __init__(self, layers: Sequence[MixedLinear], gates: Gates, *, has_weights: bool) -> None:
        self.layers = tuple(layers)
        self.has_weights = has_weights
        self._gates = gates
        self._step = _rows_to_align(layers[0].stack.a_CI)
        self._heights = tuple(layer.stack.b_KO.shape[1] for layer in layers) if has_weights else ()
        # where each layer's outputs begin among the columns of the product, and then A x
        self._starts = tuple(accumulate(map(self._padded, self._heights), initial=0))
        self._bases: tuple[nn.Module, ...] = ()
        self._pointers: tuple[tuple[int, int], ...] = ()
        self._rows_MI: Tensor | None = None
        self._bias_M: Tensor | None = None
        if has_weights:
            self._take_weights()
        self.hold()
        for place, layer in enumerate(layers):
            layer.group, layer.place = self, place

    @property
    def num_spare_bytes(self) -> int:
        """Bytes of the buffer that hold neither weights nor A's: padding, and room for experts that may come."""
        if self._rows_MI is None:
            return 0
        held = sum(self._heights) + (self._num_low if self._a_CI is None else 0)
        return (len(self._rows_MI) - held) * self._rows_MI.shape[1] * self._rows_MI.element_size()

    def hold(self) -> None:
        """Hold the layers' stacks as they are now: their A's become views of one tensor, and with weights their B's."""
        stacks = [layer.stack for layer in self.layers]
        # copied first: a stack may be a view of the place that another one takes
        a_CI = torch.cat([stack.a_CI for stack in stacks])
        self._num_low = len(a_CI)
        self._a_CI: Tensor | None = None
        if self._rows_MI is None:
            self._factors_MI, self._offsets_M = a_CI, None
            self._hold_as(a_CI, [stack.b_KO for stack in stacks])
            self._sizes = [len(stack.a_CI) for stack in stacks]
            return
        first = self._starts[-1]
        if self._num_low <= len(self._rows_MI) - first:
            a_CI = self._rows_MI[first : first + self._num_low].copy_(a_CI)
            self._factors_MI = self._rows_MI[: first + self._padded(self._num_low)]
        else:
            self._factors_MI, self._a_CI = self._rows_MI[:first], a_CI
        self._offsets_M = None if self._bias_M is None else self._bias_M[: len(self._factors_MI)]
        b_P = torch.cat([stack.b_KO.flatten() for stack in stacks])
        parts = b_P.split([stack.b_KO.numel() for stack in stacks])
        self._hold_as(a_CI, [part.view_as(stack.b_KO) for part, stack in zip(parts, stacks, strict=True)])
        blocks = [stack.b_KO for stack in self._stacks]
        self._blocks = BlockDiagonal.of(blocks, self._starts[:-1], self._columns())
        sizes = [size for height in self._heights for size in (height, self._padded(height) - height)]
        self._sizes = [*sizes, len(self._factors_MI) - first]

    def _hold_as(self, a_CI: Tensor, b_KOs: Sequence[Tensor]) -> None:
        """Let the layers have these stacks: one A's behind another's, and each B."""
        parts = a_CI.split([len(layer.stack.a_CI) for layer in self.layers])
        for layer, part, b_KO in zip(self.layers, parts, b_KOs, strict=True):
            layer.put(replace(layer.stack, a_CI=part, b_KO=b_KO))
        self._stacks = tuple(layer.stack for layer in self.layers)

    def release(self) -> None:
        """Let the layers go, each with a weight and a bias of its own again; their stacks stay what they are."""
        for base, pointers in zip(self._bases, self._pointers, strict=True):
            for tensor, pointer in zip((base.weight, base.bias), pointers, strict=True):
                if isinstance(tensor, Tensor) and tensor.data_ptr() == pointer:
                    with suppress(torch.OutOfMemoryError):  # a view is as right
                        tensor.data = tensor.data.clone()
        for layer in self.layers:
            layer.group = None

    def is_current(self) -> bool:
        """Return whether the layers hold these stacks, and their bases compute by these weights and nothing else."""
        return self.has_these_stacks() and self.has_these_bases()

    def has_these_stacks(self) -> bool:
        """Return whether the layers hold the stacks that they had when the group held them last."""
        return all(layer.stack is stack for layer, stack in zip(self.layers, self._stacks, strict=True))

    def has_these_bases(self) -> bool:
        """Return whether the layers' bases compute by the views of the group's buffers, and by nothing else.

        `to`, `half` and `load_state_dict(assign=True)` put another tensor in the place of a view; a hook that is put on
        a base's layer would be skipped by the group's product.
        """
        return all(
            layer._modules["base_layer"] is base and _pointers_of(base) == pointers and not is_hooked(base)
            for layer, base, pointers in zip(self.layers, self._bases, self._pointers, strict=False)
        )

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return a layer's part of the product with x; None where the layer has to compute by itself.

        With the weights: the layer's output with the soups added, `[..., O]`. Without: its `A x`, `[..., C]`. Either is
        a view of the product, whose rows are wider.

        Raises:
            UsageError: if the batch has other rows than the mixture that is set.
        """
        held = self._gates.held
        part = None if held is None else held.take(self, x, place)
        if part is None or held is None:
            parts = self._multiplied(x, self.layers[place].name)
            if parts is None or len(parts) == 1:
                return None if parts is None else parts[0]
            held = HeldProduct(self, x, parts)
            part = held.take(self, x, place)
        self._gates.held = held if held.num_left else None
        return part

    def _multiplied(self, x: Tensor, name: str) -> Sequence[Tensor] | None:
        """Return every layer's part; None where each layer has to compute by itself."""
        if not self._is_usable(x):
            return None
        product: Tensor = functional.linear(x, self._factors_MI, self._offsets_M)
        parts: Sequence[Tensor] = product.split(self._sizes, dim=-1)
        if not self.has_weights:
            return parts
        y_NM = product.view(-1, product.shape[-1])
        first = self._starts[-1]
        if self._a_CI is None:
            low_NC = y_NM[:, first : first + self._num_low]
        else:
            low_NC = functional.linear(x, self._a_CI).view(-1, self._num_low)
        gate_GK = self._gates.of_group(self.layers[0].slot)
        if gate_GK.device != x.device:
            gate_GK = gate_GK.to(x.device)
        add_gated(y_NM, low_NC, self._gates.fitted(x, gate_GK, name), self._blocks)
        return parts[: 2 * len(self.layers) : 2]

    def _is_usable(self, x: Tensor) -> bool:
        like = self._factors_MI
        # a product for all layers is changed in place, which autograd and autocast do not expect
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        if x.dtype != like.dtype or x.device != like.device:
            return False
        if torch.compiler.is_compiling():  # a mixture's beginning looks whether groups are current
            return True
        used = self._gates.used
        if not used or not self.is_current() or _has_any_global_hook():
            return False
        return self._is_lean or self._is_mostly(used)

    @property
    def _is_lean(self) -> bool:
        """Whether experts that nobody uses cost next to nothing: they are a small part of one product."""
        return self.has_weights and self._a_CI is None

    def _is_mostly(self, used: Collection[str]) -> bool:
        """Return whether most ranks are those of experts in `used`."""
        ranks = Counter[bool]()
        for stack in self._stacks:
            for expert, rank in zip(stack.experts, stack.ranks, strict=True):
                ranks[expert in used] += rank
        return ranks[True] >= ranks[False]

    def _take_weights(self) -> None:
        """Move the bases' weights and biases into buffers of the group, with room for A's behind the weights."""
        self._bases = tuple(layer.base_layer for layer in self.layers)
        like = self.layers[0].stack.a_CI
        num_low = sum(len(layer.stack.a_CI) for layer in self.layers)
        most = _most_low(self._starts[-1], like.shape[1])
        # twice what there is now: experts may come, and the weights shall not move again for them
        room = self._padded(min(most, 2 * num_low)) if num_low <= most else 0
        self._rows_MI = like.new_zeros(self._starts[-1] + room, like.shape[1])
        if any(base.bias is not None for base in self._bases):
            self._bias_M = like.new_zeros(len(self._rows_MI))
        for base, start, height in zip(self._bases, self._starts, self._heights, strict=False):
            for parameter, buffer in ((base.weight, self._rows_MI), (base.bias, self._bias_M)):
                if isinstance(parameter, Tensor) and buffer is not None:
                    parameter.data = buffer[start : start + height].copy_(parameter.data)
        self._pointers = tuple(map(_pointers_of, self._bases))

    def _columns(self) -> Tensor | None:
        """Return which column of the group's `A x` each rank has, None where rank k has column k."""
        if all(stack.columns_K is None for stack in self._stacks):
            return None
        found, start = [], 0
        for stack in self._stacks:
            own = stack.columns_K
            found.append(start + (torch.arange(len(stack.b_KO), device=stack.b_KO.device) if own is None else own))
            start += len(stack.a_CI)
        return torch.cat(found)

    def _padded(self, num_rows: int) -> int:
        return -(-num_rows // self._step) * self._step


def arranged(names: Collection[str]) -> list[list[str]]:
    """Return names of layers in the order of their slots; those that may read the same input stand together."""
    found: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for name in sorted(names):
        parent, _, leaf = name.rpartition(".")
        alike = next((row for row in _READ_ALIKE if leaf in row), (leaf,))
        found.setdefault((parent, alike), []).append(name)
    return [
        sorted(own, key=lambda name, alike=alike: alike.index(name.rpartition(".")[2]))  # type: ignore[misc]
        for (_, alike), own in found.items()
    ]


def units(layers: Sequence[MixedLinear]) -> list[tuple[MixedLinear, ...]]:
    """Part layers that may read the same input into those that can be computed together, and each other by itself.

    Together can be plain stacks of one width, dtype and device.
    """

    def kind(layer: MixedLinear) -> tuple[bool, int, torch.dtype, torch.device]:
        stack = layer.stack
        is_plain = stack.gains_DO is None and stack.biases_DO is None
        return is_plain, stack.a_CI.shape[1], stack.a_CI.dtype, stack.a_CI.device

    plain = [layer for layer in layers if kind(layer)[0]]
    together = tuple(layer for layer in plain if kind(layer) == kind(plain[0]))
    alone = [(layer,) for layer in layers if layer not in together]
    return [together, *alone] if together else list(alone)


def group_of(unit: Sequence[MixedLinear], gates: Gates, storages: Mapping[int, int]) -> LayerGroup | None:
    """Return a new group of the layers of a unit; None where they are no faster together than each by itself.

    Args:
        unit: of `units`.
        gates: of the model.
        storages: of the model, as `storages_of` counts them.
    """
    if unit[0].stack.gains_DO is not None or unit[0].stack.biases_DO is not None:
        return None
    has_weights = takes_weights(unit, storages)
    return LayerGroup(unit, gates, has_weights=has_weights) if has_weights or len(unit) > 1 else None


def takes_weights(layers: Sequence[MixedLinear], storages: Mapping[int, int]) -> bool:
    """Return whether a group of these layers shall hold the base's weights.

    Args:
        layers: of a unit.
        storages: for each storage of the model, by its address, how many parameters are in it.
    """
    if not all(is_plain(layer.base_layer, layer.stack.a_CI, storages) for layer in layers):
        return False
    num_numbers = sum(layer.weight.numel() for layer in layers)
    return layers[0].stack.a_CI.is_cuda or num_numbers <= _MOST_NUMBERS_ON_CPU


def is_plain(base: nn.Module, like: Tensor, storages: Mapping[int, int]) -> bool:
    """Return whether a layer is x W^T + b and nothing else, with a weight that may become a view of another buffer.

    That is `nn.Linear` itself, without hooks, parametrisation, PEFT's or accelerate's wrapping, whose tensors are in
    `like`'s dtype and on its device, not sharded, not on the meta device, and alone in their storage: a weight that is
    tied to another, or part of a memory-mapped file, stays where it is.
    """
    if type(base) is not nn.Linear or is_hooked(base):
        return False
    tensors = [tensor for tensor in base._parameters.values() if tensor is not None]
    return all(_may_move(tensor, like, storages) for tensor in tensors)


def is_hooked(base: nn.Module) -> bool:
    """Return whether calling a layer does more than its forward: hooks, or a forward that was put in its place."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks) or "forward" in base.__dict__


def storages_of(model: nn.Module) -> Counter[int]:
    """Return how many parameters and buffers of a model are in each storage, by its address."""
    tensors = (tensor for tensor in (*model.parameters(), *model.buffers()) if type(tensor.data) is Tensor)
    return Counter(tensor.untyped_storage().data_ptr() for tensor in tensors if not tensor.is_meta)


def _may_move(tensor: nn.Parameter, like: Tensor, storages: Mapping[int, int]) -> bool:
    """Return whether a parameter may become a view of another buffer: see `is_plain`."""
    is_usual = type(tensor) is nn.Parameter and type(tensor.data) is Tensor and not tensor.is_inference()
    if not is_usual or tensor.is_meta or (tensor.dtype, tensor.device) != (like.dtype, like.device):
        return False
    storage = tensor.untyped_storage()
    is_alone = storage.nbytes() == tensor.nbytes and storages.get(storage.data_ptr(), 0) == 1
    return is_alone and tensor.is_contiguous()


def _most_low(num_rows: int, in_features: int) -> int:
    """Return how many rows of A's may stand behind so many rows of weights."""
    return max(int(_ROOM * num_rows), _FEW_NUMBERS // in_features)


def _rows_to_align(like: Tensor) -> int:
    """Return after how many rows of a buffer a weight may begin: a power of two of at least 16."""
    row_bytes = like.shape[1] * like.element_size()
    return max(_ALIGNED_COLUMNS, _ALIGNED_BYTES // math.gcd(_ALIGNED_BYTES, row_bytes))


def _pointers_of(base: nn.Module) -> tuple[int, int]:
    """Return the addresses of a layer's weight and bias, 0 where there is none."""
    weight, bias = base._parameters.get("weight"), base._parameters.get("bias")
    return 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr()


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place, as far as that is counted."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
