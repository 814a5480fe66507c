"""A group of layers whose base weights and A's are rows of one buffer, so that one matrix product multiplies them all.

Shapes: G = gates, N = rows of the input, M = rows of the buffer, C = rows of the A's, K = ranks of all layers together,
P = elements of all B's, I = in_features, O = out_features.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from personalized_soups.kernels.add_gated import BlockDiagonal, add_gated
from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.groups import LayerGroup
from personalized_soups.mixing.layers.stack import Stack

if TYPE_CHECKING:
    from personalized_soups.mixing.layers.mixed_linear import MixedLinear

# The alignment that the fast kernels of cuBLAS need. Each weight begins at a multiple of so many bytes, and each
# layer's output at a multiple of so many columns.
_ALIGNED_BYTES = 256
_ALIGNED_COLUMNS = 16

# The A's are rows of the weights' buffer if they take at most the share _ROOM of the weights, or have at most
# _FEW_NUMBERS elements, so that only the number of calls matters. Larger A's are multiplied in a second product.
_ROOM = 1 / 8
_FEW_NUMBERS = 1 << 17

# If other code replaces nn.Linear.forward, its function must be called. `is_hooked` detects this by comparing with the
# function that nn.Linear had when this module was imported.
_FORWARD = nn.Linear.forward


class WeightGroup(LayerGroup):
    """A group of plain `nn.Linear` layers. Their weights are views of one buffer, which also holds the A's.

    The buffer's rows are [W_1, padding, W_2, padding, ..., A_1, A_2, ..., padding]. The biases are views of a second
    buffer with the same layout. If the A's do not fit behind the weights, they have their own tensor, and a second
    product is computed with it.
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
        # There is room for twice the current A's, because the weights must not move again when experts are added.
        room = self._padded(min(most, 2 * num_a)) if num_a <= most else 0
        self._rows_MI = like.new_zeros(self._first_a + room, like.shape[1])
        has_bias = any(base.bias is not None for base in self._bases)
        self._bias_M = like.new_zeros(len(self._rows_MI)) if has_bias else None
        self._parameters: tuple[tuple[nn.Parameter | None, ...], ...] = tuple(
            (base.weight, base.bias) for base in self._bases
        )
        # The addresses of each weight and bias in the buffers. The tuple is empty until `move_weights` is called.
        self._pointers: tuple[tuple[int, int], ...] = ()
        self._factors_MI = self._rows_MI

    @property
    def num_spare_bytes(self) -> int:
        """The size in bytes of the buffer's padding and of its room for the A's of more experts."""
        if not self._pointers:
            return 0
        num_a = sum(len(stack.a_CI) for stack in self._stacks) if self._a_CI is None else 0
        num_spare = len(self._rows_MI) - sum(self._heights) - num_a
        return num_spare * self._rows_MI.stride(0) * self._rows_MI.element_size()

    def move_weights(self) -> None:
        """Copy the base's weights and biases into the buffers, and make the parameters views of them."""
        for parameters, start, height in zip(self._parameters, self._starts, self._heights, strict=True):
            for parameter, buffer in zip(parameters, (self._rows_MI, self._bias_M), strict=True):
                if parameter is not None and buffer is not None:
                    parameter.data = buffer[start : start + height].copy_(parameter.data)
        self._pointers = tuple((_address(weight), _address(bias)) for weight, bias in self._parameters)

    def hold(self) -> None:
        """Copy the A's and B's of the layers' current stacks into the group's buffers, and replace them by views."""
        stacks = [layer.stack for layer in self.layers]
        # All memory is allocated before anything is written. The A's are copied, because the current A's may be views
        # of the rows that are written below.
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
        # The product leaves out the rows of the buffer that the A's do not need.
        num_rows = self._first_a + (self._padded(len(a_CI)) if is_within else 0)
        self._factors_MI = self._rows_MI[:num_rows]
        self._offsets_M = None if self._bias_M is None else self._bias_M[:num_rows]
        for layer, stack, whole in zip(self.layers, fresh, wholes, strict=True):
            layer.put(stack, whole)
        self._stacks = tuple(layer.stack for layer in self.layers)
        self._num_a = len(a_CI)
        # The columns of the product are each layer's outputs, followed by the layer's padding, and then the A's.
        outputs = [size for height in self._heights for size in (height, self._padded(height) - height)]
        self._sizes = [*outputs, len(self._factors_MI) - self._first_a]

    def dissolve(self) -> None:
        """Make the layers compute separately. Each parameter that is still a view gets its own tensor again."""
        super().dissolve()
        for parameters, pointers in zip(self._parameters, self._pointers, strict=False):
            for parameter, pointer in zip(parameters, pointers, strict=True):
                if parameter is not None and _address(parameter) == pointer:
                    with suppress(RuntimeError):  # without memory for a copy, the view stays, which is also correct
                        parameter.data = parameter.data.clone()
        self._rows_MI = self._factors_MI = self._rows_MI[:0].clone()
        self._a_CI = self._bias_M = self._offsets_M = None
        self._pointers = ()

    def has_these_bases(self) -> bool:
        """Return whether the base layers still use the views of the group's buffers, and have no hooks.

        `to`, `half` and `load_state_dict(assign=True)` replace a view by another tensor. Hooks of a base layer would
        not run, because the group does not call the base layer.
        """
        if not self._pointers:
            return False
        for layer, base, (weight, bias) in zip(self.layers, self._bases, self._parameters, strict=True):
            # The modules' dicts are read, because attributes of nn.Module are slow and this runs in every forward pass.
            held: Any = layer._modules["base_layer"]
            if held is not base or is_hooked(held):
                return False
            if held._parameters["weight"] is not weight or held._parameters["bias"] is not bias:
                return False
        # Addresses cannot be compared while compiling. With compiled code, an assignment to `parameter.data` is noticed
        # when the next mixture is set.
        return torch.compiler.is_compiling() or all(
            (_address(weight), _address(bias)) == pointers
            for (weight, bias), pointers in zip(self._parameters, self._pointers, strict=True)
        )

    def _is_worth(self, used: Collection[str]) -> bool:
        """Return whether the group should compute the batch. A's within the weights' buffer cost very little."""
        return (bool(used) and self._a_CI is None) or super()._is_worth(used)

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        product: Tensor = functional.linear(x, self._factors_MI, self._offsets_M)
        y_NM = product.view(-1, product.shape[-1])
        if self._a_CI is None:
            ax_NC = y_NM[:, self._first_a : self._first_a + self._num_a]
        else:
            ax_NC = functional.linear(x, self._a_CI).view(-1, self._num_a)
        gate_GK = self._gates.of_group(self.layers[0].slot).to(ax_NC.device, ax_NC.dtype)
        add_gated(y_NM, ax_NC, self._gates.fitted(x, gate_GK, name), self._blocks)
        parts: Sequence[Tensor] = product.split(self._sizes, dim=-1)
        return parts[: 2 * len(self.layers) : 2]  # the parts between the layers' outputs are padding

    def _padded(self, num_rows: int) -> int:
        return -(-num_rows // self._alignment) * self._alignment


def is_hooked(base: nn.Module) -> bool:
    """Return whether a call of the layer would run hooks, or a forward other than that of nn.Linear."""
    hooks = (base._forward_hooks, base._forward_pre_hooks, base._backward_hooks, base._backward_pre_hooks)
    return any(hooks) or "forward" in base.__dict__ or type(base).forward is not _FORWARD


def _columns_of(stacks: Sequence[Stack]) -> Tensor | None:
    """Return, for each rank, the column of the group's `A x` that belongs to it; None if rank k has column k."""
    if all(stack.columns_K is None for stack in stacks):
        return None
    columns, start = [], 0
    for stack in stacks:
        own = stack.columns_K
        columns.append(start + (torch.arange(len(stack.b_KO), device=stack.b_KO.device) if own is None else own))
        start += len(stack.a_CI)
    return torch.cat(columns)


def _rows_to_align(like: Tensor) -> int:
    """Return the alignment of the weights in rows: a weight may begin at any multiple of this number.

    The number is a power of two, and at least 16.
    """
    row_bytes = like.shape[1] * like.element_size()
    return max(_ALIGNED_COLUMNS, _ALIGNED_BYTES // math.gcd(_ALIGNED_BYTES, row_bytes))


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
