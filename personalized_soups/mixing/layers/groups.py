"""Groups of layers that read the same input, and share one product with it while a mixture is set.

A layer on its own needs four steps: a product with its weight, a product with the experts' A's, the gate, and a product
with their B's. That makes twelve calls for q, k and v. A group needs three: one product
`[Wq; Wk; Wv; Aq; Ak; Av] x`, one gate, and one kernel for all B's. Calls matter because a GPU's decode step is bound by
the number of launches, and a small model on a CPU by the number of calls into torch.

N rows of the input, C rows of the A's, R rows of one layer's distinct A's, I in features, O out features.
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
    """Layers of one parent module that read the same input, and the tensors that they multiply it with.

    Attributes:
        layers: the layers.
        has_weights: whether `take` returns a layer's whole output; otherwise it returns `A x` alone.

    Args:
        layers: wrapped layers of one device and dtype, without DoRA and lora_bias.
        gates: of the model; the columns of these layers are neighbours.
    """

    has_weights = False

    def __init__(self, layers: Sequence[MixedLinear], gates: Gates) -> None:
        self.layers = tuple(layers)
        self._gates = gates
        self._stacks: tuple[Stack, ...] = ()

    @property
    def num_spare_bytes(self) -> int:
        """Bytes of the group's buffers that hold neither weights nor factors."""
        return 0

    def join(self) -> None:
        """Make the layers use this group."""
        for place, layer in enumerate(self.layers):
            layer.group, layer.place = self, place

    def hold(self) -> None:
        """Take over the layers' current stacks. If memory runs out, nothing has changed."""
        raise NotImplementedError

    def has_these_stacks(self) -> bool:
        """Return whether the layers still hold the stacks that the group took over last."""
        # Identity and not equality: a changed expert always gives a new stack.
        return len(self._stacks) == len(self.layers) and all(
            layer.stack is stack for layer, stack in zip(self.layers, self._stacks, strict=True)
        )

    def has_these_bases(self) -> bool:
        """Return whether the group still computes what the base's layers compute."""
        return True

    def is_current(self) -> bool:
        """Return whether the group computes what its layers would compute separately."""
        return self.has_these_stacks() and self.has_these_bases()

    def dissolve(self) -> None:
        """Release the layers and the group's tensors. Views of its buffers stay valid."""
        for layer in self.layers:
            if layer.group is self:
                layer.group = None
        self._stacks = ()

    def take(self, place: int, x: Tensor) -> Tensor | None:
        """Return one layer's part of the product with x.

        Returns:
            With weights, the layer's output with the soups added, `[..., O]`. Without, its `A x`, `[..., R]`. Either is
            a view of the product, whose rows are wider. None if the layer must compute separately.

        Raises:
            UsageError: if the batch does not have the rows of the mixture that is set.
        """
        # The product of the first layer that is called waits in the gates for the others.
        held = self._gates.held
        part = None if held is None else held.take(self, x, place)
        if part is None or held is None:
            parts = self._parts(x, self.layers[place].name) if self._is_usable(x) else None
            # A group of one layer has nothing to keep for others.
            if parts is None or len(parts) == 1:
                return None if parts is None else parts[0]
            held = HeldProduct(self, x, parts)
            part = held.take(self, x, place)
        # The last part is taken: the product and its input may be freed.
        self._gates.held = held if held.num_left else None
        return part

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        """Return every layer's part of the product with x; errors name the layer `name`."""
        raise NotImplementedError

    def _is_usable(self, x: Tensor) -> bool:
        # The parts are changed in place, which neither autograd nor autocast expects.
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type):
            return False
        like = self._stacks[0].a_CI if self._stacks else None
        if like is None or x.dtype != like.dtype or x.device != like.device:
            return False
        # A global hook expects a call of each layer, which the shared product skips.
        if not self.has_these_bases() or _has_any_global_hook():
            return False
        # Compiled code computes all experts, and guards its stacks by the layers' attributes.
        return torch.compiler.is_compiling() or (self.has_these_stacks() and self._is_worth(self._gates.used))

    def _is_worth(self, used: Collection[str]) -> bool:
        """Return whether the batch uses at least half of the ranks: the group's product contains all ranks."""
        ranks = Counter[bool]()
        for stack in self._stacks:
            for expert, rank in zip(stack.experts, stack.ranks, strict=True):
                ranks[expert in used] += rank
        return bool(used) and ranks[True] >= ranks[False]


class FactorGroup(LayerGroup):
    """A group whose A's are one product, for layers of any kind. Each layer computes the rest separately."""

    def hold(self) -> None:
        """Take over the layers' current stacks: their A's become views of one tensor."""
        stacks = [layer.stack for layer in self.layers]
        self._a_CI = torch.cat([stack.a_CI for stack in stacks])
        self._sizes = [len(stack.a_CI) for stack in stacks]
        # Views: the layers' own spans and the group's product share the memory.
        for layer, a_CI in zip(self.layers, self._a_CI.split(self._sizes), strict=True):
            layer.put(replace(layer.stack, a_CI=a_CI))
        self._stacks = tuple(layer.stack for layer in self.layers)

    def _parts(self, x: Tensor, name: str) -> Sequence[Tensor]:
        ax: Tensor = functional.linear(x, self._a_CI)
        parts: Sequence[Tensor] = ax.split(self._sizes, dim=-1)
        return parts
