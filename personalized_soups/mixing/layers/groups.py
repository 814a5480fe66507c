"""Groups of layers that read the same input x, and compute one matrix product with it while a mixture is set.

A single layer needs four operations: the product with its weight, the product with the experts' A's, the multiplication
by the gates, and the product with the experts' B's. For q, k and v, these are twelve operations. A group of the three
layers needs only three: one product `[Wq; Wk; Wv; Aq; Ak; Av] x`, one multiplication by the gates, and one kernel for
all B's. Fewer operations are faster, because the time of a decode step is that of the kernel launches on a GPU, and
that of the calls into torch for a small model on a CPU.

Shapes: I = in_features, O = out_features, C = rows of all A's of the group, R = rows of the distinct A's of one layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules.module import _has_any_global_hook

from personalized_soups.mixing.layers.gates import Gates
from personalized_soups.mixing.layers.held_product import HeldProduct
from personalized_soups.mixing.layers.stack import Stack

if TYPE_CHECKING:
    from personalized_soups.mixing.layers.mixed_linear import MixedLinear


class LayerGroup:
    """Layers of one parent module that read the same input, and the tensors by which the group multiplies this input.

    Attributes:
        layers: the layers of the group.
        has_weights: True if `take` returns a layer's whole output, False if `take` returns only `A x`.

    Args:
        layers: wrapped layers with the same device and dtype, without DoRA and lora_bias.
        gates: the gates of the model, in which the columns of these layers are contiguous.
    """

    has_weights = False

    def __init__(self, layers: Sequence[MixedLinear], gates: Gates) -> None:
        self.layers = tuple(layers)
        self._gates = gates
        self._stacks: tuple[Stack, ...] = ()

    @property
    def num_spare_bytes(self) -> int:
        """The size in bytes of the parts of the group's buffers that hold neither weights nor factors."""
        return 0

    def join(self) -> None:
        """Make the layers compute with this group."""
        for place, layer in enumerate(self.layers):
            layer.group, layer.place = self, place

    def hold(self) -> None:
        """Store the layers' current stacks in the group's tensors. If memory runs out, nothing changes."""
        raise NotImplementedError

    def has_these_stacks(self) -> bool:
        """Return whether the layers still have the stacks that the last call of `hold` stored."""
        # Stacks are compared by identity, because a changed expert always gives a new stack.
        return len(self._stacks) == len(self.layers) and all(
            layer.stack is stack for layer, stack in zip(self.layers, self._stacks, strict=True)
        )

    def has_these_bases(self) -> bool:
        """Return whether the base layers still use the weights in the group's buffer. True if there is no buffer."""
        return True

    def is_current(self) -> bool:
        """Return whether the group has the same result as its layers would have separately."""
        return self.has_these_stacks() and self.has_these_bases()

    def dissolve(self) -> None:
        """Make the layers compute separately, and release the group's tensors. Views of its buffers stay valid."""
        for layer in self.layers:
            if layer.group is self:
                layer.group = None
        self._stacks = ()

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return one layer's part of the group's product with x. The product is computed when the first layer asks.

        Args:
            place: the layer's number in the group.
            x: the layer's input, `[..., I]`.

        Returns:
            If `has_weights`, the layer's output with the soups added, `[..., O]`, else the layer's `A x`, `[..., R]`.
            The tensor is a view of the product, so it is not contiguous. None if the layer must compute separately.

        Raises:
            UsageError: if the number of rows in the batch is not that of the mixture.
        """
        # The first layer that is called computes the product. The gates hold it for the other layers.
        held = self._gates.held
        part = None if held is None else held.take(self, x, place)
        if part is None or held is None:
            parts = self._parts(x, self.layers[place].name) if self._is_usable(x) else None
            # A group of one layer need not keep its product.
            if parts is None or len(parts) == 1:
                return None if parts is None else parts[0]
            held = HeldProduct(self, x, parts)
            part = held.take(self, x, place)
        # After the last part is taken, the product and its input may be freed.
        self._gates.held = held if held.num_left else None
        return part

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        """Return every layer's part of the product with x. `name` is the layer that errors mention."""
        raise NotImplementedError

    def _is_usable(self, x: Tensor) -> bool:
        # The parts are changed in place, which autograd and autocast do not support.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        like = self._stacks[0].a_CI if self._stacks else None
        if like is None or x.dtype != like.dtype or x.device != like.device:
            return False
        # A global hook must run for each base layer, but a group does not call the base layers.
        if not self.has_these_bases() or _has_any_global_hook():
            return False
        # Compiled code always computes all experts. torch compiles it again if a layer's stack is replaced.
        return torch.compiler.is_compiling() or (self.has_these_stacks() and self._is_worth(self._gates.used))

    def _is_worth(self, used: Collection[str]) -> bool:
        """Return whether the batch uses at least half of the ranks. The group's product always computes all ranks."""
        ranks = Counter[bool]()
        for stack in self._stacks:
            for expert, rank in zip(stack.experts, stack.ranks, strict=True):
                ranks[expert in used] += rank
        return bool(used) and ranks[True] >= ranks[False]


class FactorGroup(LayerGroup):
    """A group, for layers of any kind, that computes only the product with all A's. Layers compute the rest separately.

    The A's of all layers are rows of one tensor.
    """

    def hold(self) -> None:
        """Copy the A's of the layers' current stacks into one tensor, and replace them by views of this tensor."""
        stacks = [layer.stack for layer in self.layers]
        self._a_CI = torch.cat([stack.a_CI for stack in stacks])
        self._sizes = [len(stack.a_CI) for stack in stacks]
        # With views, the layers and the group do not need the memory twice.
        for layer, a_CI in zip(self.layers, self._a_CI.split(self._sizes), strict=True):
            layer.put(replace(layer.stack, a_CI=a_CI))
        self._stacks = tuple(layer.stack for layer in self.layers)

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        ax: Tensor = functional.linear(x, self._a_CI)
        parts: Sequence[Tensor] = ax.split(self._sizes, dim=-1)
        return parts
