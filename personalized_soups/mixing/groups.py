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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from personalized_soups.kernels.add_gated import BlockDiagonal, add_gated
from personalized_soups.mixing.gates import Gates
from personalized_soups.mixing.held_product import HeldProduct
from personalized_soups.mixing.stack import Stack

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
# one product for weights and A's was no faster than two (docs/explanation/decisions.md), moving the weights takes 5
# seconds, and a memory-mapped base would become private memory.
_MOST_NUMBERS_ON_CPU = 1 << 20

# `is_hooked` compares with it: code that patches nn.Linear.forward must be called.
_FORWARD = nn.Linear.forward


class LayerGroup:
    """Layers of one parent that read the same input, and what they multiply it with while a mixture is set.

    Args:
        layers: wrapped ones of one device and dtype, without DoRA and lora_bias.
        gates: of the model, whose columns for these layers follow each other.
    """

    # whether `take` returns a layer's whole output, and not its `A x` alone
    has_weights = False

    def __init__(self, layers: Sequence[MixedLinear], gates: Gates) -> None:
        self.layers = tuple(layers)
        self._gates = gates
        self._stacks: tuple[Stack, ...] = ()

    @property
    def num_spare_bytes(self) -> int:
        """Bytes of buffers that hold neither weights nor factors."""
        return 0

    def join(self) -> None:
        """Let the layers ask this group."""
        for place, layer in enumerate(self.layers):
            layer.group, layer.place = self, place

    def hold(self) -> None:
        """Hold the layers' stacks as they are now. Nothing has changed where memory runs out."""
        raise NotImplementedError

    def has_these_stacks(self) -> bool:
        """Return whether the layers hold the stacks that they had when the group held them last."""
        return len(self._stacks) == len(self.layers) and all(
            layer.stack is stack for layer, stack in zip(self.layers, self._stacks, strict=True)
        )

    def has_these_bases(self) -> bool:
        """Return whether the bases' layers still compute what the group computes for them."""
        return True

    def is_current(self) -> bool:
        """Return whether the group computes what its layers would compute each by itself."""
        return self.has_these_stacks() and self.has_these_bases()

    def dissolve(self) -> None:
        """Let the layers go and hold nothing any more; what shows a part of a buffer keeps showing it."""
        for layer in self.layers:
            if layer.group is self:
                layer.group = None
        self._stacks = ()

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return a layer's part of the product with x; None where the layer has to compute by itself.

        With weights: the layer's output with the soups added, `[..., O]`. Without: its `A x`, `[..., R]`, where R is
        the number of its distinct A rows. Either is a view of the product, whose rows are wider.

        Raises:
            UsageError: if the batch has other rows than the mixture that is set.
        """
        held = self._gates.held
        part = None if held is None else held.take(self, x, place)
        if part is None or held is None:
            parts = self._parts(x, self.layers[place].name) if self._is_usable(x) else None
            if parts is None or len(parts) == 1:
                return None if parts is None else parts[0]
            held = HeldProduct(self, x, parts)
            part = held.take(self, x, place)
        self._gates.held = held if held.num_left else None
        return part

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        """Return every layer's part of the product with x; `name` is that of the layer that asks."""
        raise NotImplementedError

    def _is_usable(self, x: Tensor) -> bool:
        # parts are changed in place, which autograd and autocast do not expect
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        like = self._stacks[0].a_CI if self._stacks else None
        if like is None or x.dtype != like.dtype or x.device != like.device:
            return False
        if not self.has_these_bases() or _has_any_global_hook():
            return False
        # what is compiled computes all experts, and takes stacks by their attributes
        return torch.compiler.is_compiling() or (self.has_these_stacks() and self._is_worth(self._gates.used))

    def _is_worth(self, used: Collection[str]) -> bool:
        """Return whether most ranks are those of experts that the batch uses: the product has all of them."""
        ranks = Counter[bool]()
        for stack in self._stacks:
            for expert, rank in zip(stack.experts, stack.ranks, strict=True):
                ranks[expert in used] += rank
        return bool(used) and ranks[True] >= ranks[False]


class FactorGroup(LayerGroup):
    """A group of any layers, quantised ones too: their A's are one product, and each computes the rest by itself."""

    def hold(self) -> None:
        """Hold the layers' stacks as they are now: their A's become views of one tensor."""
        stacks = [layer.stack for layer in self.layers]
        self._a_CI = torch.cat([stack.a_CI for stack in stacks])
        self._sizes = [len(stack.a_CI) for stack in stacks]
        for layer, a_CI in zip(self.layers, self._a_CI.split(self._sizes), strict=True):
            layer.put(replace(layer.stack, a_CI=a_CI))
        self._stacks = tuple(layer.stack for layer in self.layers)

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        low: Tensor = functional.linear(x, self._a_CI)
        parts: Sequence[Tensor] = low.split(self._sizes, dim=-1)
        return parts


class WeightGroup(LayerGroup):
    """A group of plain `nn.Linear`s, whose weights are views of one buffer, with the A's behind them.

    The buffer's rows are [W_1, padding, W_2, padding, ..., A_1, A_2, ..., padding]; biases have a buffer like it. Where
    the A's do not fit behind the weights they are a tensor of their own, and a second product.
    """

    has_weights = True

    def __init__(self, layers: Sequence[MixedLinear], gates: Gates) -> None:
        super().__init__(layers, gates)
        self._bases: tuple[Any, ...] = tuple(layer.base_layer for layer in layers)
        like = layers[0].stack.a_CI
        self._alignment = _rows_to_align(like)
        self._heights = tuple(len(base.weight) for base in self._bases)
        *starts, self._first_a = accumulate(map(self._padded, self._heights), initial=0)
        self._starts = tuple(starts)
        num_a = sum(len(layer.stack.a_CI) for layer in layers)
        most = max(int(_ROOM * self._first_a), _FEW_NUMBERS // like.shape[1])
        # twice what there is now: experts may come, and the weights shall not move again for them
        room = self._padded(min(most, 2 * num_a)) if num_a <= most else 0
        self._rows_MI = like.new_zeros(self._first_a + room, like.shape[1])
        has_bias = any(base.bias is not None for base in self._bases)
        self._bias_M = like.new_zeros(len(self._rows_MI)) if has_bias else None
        self._parameters: tuple[tuple[nn.Parameter | None, ...], ...] = tuple(
            (base.weight, base.bias) for base in self._bases
        )
        self._pointers: tuple[tuple[int, int], ...] = ()
        self._factors_MI = self._rows_MI

    @property
    def num_spare_bytes(self) -> int:
        """Bytes of the buffer that hold neither weights nor A's: padding, and room for experts that may come."""
        if not self._pointers:
            return 0
        num_a = sum(len(stack.a_CI) for stack in self._stacks) if self._a_CI is None else 0
        return (
            (len(self._rows_MI) - sum(self._heights) - num_a) * self._rows_MI.stride(0) * self._rows_MI.element_size()
        )

    def move_weights(self) -> None:
        """Copy the bases' weights and biases into the buffers, of which they become views."""
        for parameters, start, height in zip(self._parameters, self._starts, self._heights, strict=True):
            for parameter, buffer in zip(parameters, (self._rows_MI, self._bias_M), strict=True):
                if parameter is not None and buffer is not None:
                    parameter.data = buffer[start : start + height].copy_(parameter.data)
        self._pointers = tuple((_address(weight), _address(bias)) for weight, bias in self._parameters)

    def hold(self) -> None:
        """Hold the layers' stacks as they are now: their A's and B's become views of the group's buffers."""
        stacks = [layer.stack for layer in self.layers]
        # everything is allocated before anything is written; and a stack may show the place that another one takes
        a_CI = torch.cat([stack.a_CI for stack in stacks])
        b_P = torch.cat([stack.b_KO.flatten() for stack in stacks])
        parts = b_P.split([stack.b_KO.numel() for stack in stacks])
        blocks = [part.view_as(stack.b_KO) for part, stack in zip(parts, stacks, strict=True)]
        factors = BlockDiagonal.of(blocks, self._starts, _columns_of(stacks))
        end = self._first_a + len(a_CI)
        is_within = end <= len(self._rows_MI)
        held_CI = self._rows_MI[self._first_a : end] if is_within else a_CI
        a_parts = held_CI.split([len(stack.a_CI) for stack in stacks])
        fresh = [
            replace(stack, a_CI=a_part, b_KO=b_KO) for stack, a_part, b_KO in zip(stacks, a_parts, blocks, strict=True)
        ]
        wholes = [stack.whole() for stack in fresh]
        if is_within:
            held_CI.copy_(a_CI)
        self._blocks, self._a_CI = factors, None if is_within else a_CI
        num_rows = self._first_a + (self._padded(len(a_CI)) if is_within else 0)
        self._factors_MI = self._rows_MI[:num_rows]
        self._offsets_M = None if self._bias_M is None else self._bias_M[:num_rows]
        for layer, stack, whole in zip(self.layers, fresh, wholes, strict=True):
            layer.put(stack, whole)
        self._stacks = tuple(layer.stack for layer in self.layers)
        self._num_a = len(a_CI)
        # each layer's outputs, each with its padding behind it, and then the A's
        outputs = [size for height in self._heights for size in (height, self._padded(height) - height)]
        self._sizes = [*outputs, len(self._factors_MI) - self._first_a]

    def dissolve(self) -> None:
        """Let the layers go, those whose weight is still a view with a weight of its own again."""
        super().dissolve()
        for parameters, pointers in zip(self._parameters, self._pointers, strict=False):
            for parameter, pointer in zip(parameters, pointers, strict=True):
                if parameter is not None and _address(parameter) == pointer:
                    with suppress(RuntimeError):  # no memory: a view is as right
                        parameter.data = parameter.data.clone()
        self._rows_MI = self._factors_MI = self._rows_MI[:0].clone()
        self._a_CI = self._bias_M = self._offsets_M = None
        self._pointers = ()

    def has_these_bases(self) -> bool:
        """Return whether the layers' bases compute by the views of the group's buffers, and by nothing else.

        `to`, `half` and `load_state_dict(assign=True)` put another tensor in the place of a view; a hook that is put on
        a base's layer would be skipped by the group's product.
        """
        if not self._pointers:
            return False
        for layer, base, (weight, bias) in zip(self.layers, self._bases, self._parameters, strict=True):
            held: Any = layer._modules["base_layer"]
            if held is not base or is_hooked(held):
                return False
            if held._parameters["weight"] is not weight or held._parameters["bias"] is not bias:
                return False
        # a compiler sees no addresses: there, the next mixture notices a `parameter.data = ...`
        return torch.compiler.is_compiling() or all(
            (_address(weight), _address(bias)) == pointers
            for (weight, bias), pointers in zip(self._parameters, self._pointers, strict=True)
        )

    def _is_worth(self, used: Collection[str]) -> bool:
        """Return whether a batch is computed by the group: A's behind the weights cost next to nothing."""
        return (bool(used) and self._a_CI is None) or super()._is_worth(used)

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        product: Tensor = functional.linear(x, self._factors_MI, self._offsets_M)
        y_NM = product.view(-1, product.shape[-1])
        if self._a_CI is None:
            low_NC = y_NM[:, self._first_a : self._first_a + self._num_a]
        else:
            low_NC = functional.linear(x, self._a_CI).view(-1, self._num_a)
        gate_GK = self._gates.of_group(self.layers[0].slot).to(low_NC.device, low_NC.dtype)
        add_gated(y_NM, low_NC, self._gates.fitted(x, gate_GK, name), self._blocks)
        parts: Sequence[Tensor] = product.split(self._sizes, dim=-1)
        return parts[: 2 * len(self.layers) : 2]

    def _padded(self, num_rows: int) -> int:
        return -(-num_rows // self._alignment) * self._alignment


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
    """Part layers that may read the same input into those that can be a group, and each other by itself.

    A group is of plain stacks of one width, dtype and device.
    """

    def kind(layer: MixedLinear) -> tuple[int, torch.dtype, torch.device]:
        a_CI = layer.stack.a_CI
        return a_CI.shape[1], a_CI.dtype, a_CI.device

    plain = [layer for layer in layers if _is_plain_stack(layer.stack)]
    together = tuple(layer for layer in plain if kind(layer) == kind(plain[0]))
    alone = [(layer,) for layer in layers if layer not in together]
    return [together, *alone] if together else list(alone)


def new_group(unit: Sequence[MixedLinear], gates: Gates, storages: Mapping[int, int]) -> LayerGroup | None:
    """Return a group of the layers of a unit, which hold it; None where they are no faster than each by itself.

    Args:
        unit: of `units`.
        gates: of the model.
        storages: of the model, as `storages_of` counts them.

    Raises:
        RuntimeError: if memory runs out; the layers are as they were.
    """
    if not _is_plain_stack(unit[0].stack):
        return None
    group: LayerGroup
    if takes_weights(unit, storages):
        group = weights = WeightGroup(unit, gates)
        weights.move_weights()
    elif len(unit) > 1:
        group = FactorGroup(unit, gates)
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
    """Return whether a group of these layers shall hold the base's weights.

    Args:
        layers: of a unit.
        storages: for each storage of the model, by its address, how often it is among the parameters.
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
    return any(hooks) or "forward" in base.__dict__ or type(base).forward is not _FORWARD


def storages_of(model: nn.Module) -> Counter[int]:
    """Return how often each storage, by its address, is among a model's parameters and buffers.

    A parameter counts once for each of its names: a layer may be in several modules, or under several names.
    """
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    tensors = (tensor for _, tensor in named if type(tensor.data) is Tensor and not tensor.is_meta)
    return Counter(tensor.untyped_storage().data_ptr() for tensor in tensors)


def _may_move(tensor: nn.Parameter, like: Tensor, storages: Mapping[int, int]) -> bool:
    """Return whether a parameter may become a view of another buffer: see `is_plain`."""
    is_usual = type(tensor) is nn.Parameter and type(tensor.data) is Tensor and not tensor.is_inference()
    if not is_usual or tensor.is_meta or (tensor.dtype, tensor.device) != (like.dtype, like.device):
        return False
    storage = tensor.untyped_storage()
    is_alone = storage.nbytes() == tensor.nbytes and storages.get(storage.data_ptr(), 0) == 1
    # every CUDA tensor counts as shared
    return is_alone and tensor.is_contiguous() and (tensor.is_cuda or not tensor.is_shared())


def _is_plain_stack(stack: Stack) -> bool:
    return stack.gains_DO is None and stack.biases_DO is None


def _columns_of(stacks: Sequence[Stack]) -> Tensor | None:
    """Return which column of the group's `A x` each rank has, None where rank k has column k."""
    if all(stack.columns_K is None for stack in stacks):
        return None
    found, start = [], 0
    for stack in stacks:
        own = stack.columns_K
        found.append(start + (torch.arange(len(stack.b_KO), device=stack.b_KO.device) if own is None else own))
        start += len(stack.a_CI)
    return torch.cat(found)


def _rows_to_align(like: Tensor) -> int:
    """Return after how many rows of a buffer a weight may begin: a power of two of at least 16."""
    row_bytes = like.shape[1] * like.element_size()
    return max(_ALIGNED_COLUMNS, _ALIGNED_BYTES // math.gcd(_ALIGNED_BYTES, row_bytes))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
