"""The matrix product that a group of layers has computed, held until each layer has taken its part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HeldProduct:
    """The parts of a group's product that layers have not taken yet.

    The object also keeps the input x of the product, so that no other tensor can get the identity of x.

    Attributes:
        num_left: the number of parts that are left.
    """

    __slots__ = ("_group", "_parts", "_version", "_x", "num_left")

    def __init__(self, group: object, x: Tensor, parts: Sequence[Tensor]) -> None:
        self._group = group
        self._x = x
        # A layer may change x in place before the next layer reads it.
        self._version = _version(x)
        self._parts: list[Tensor | None] = list(parts)
        self.num_left = len(parts)

    def take(self, group: object, x: Tensor, place: int) -> Tensor | None:
        """Return a layer's part of the product. Each part can be taken once.

        Return None if the part was taken before, or if the product was computed by another group or from another input.
        An input that was changed in place counts as another input. But torch does not record changes of tensors that
        were created in inference mode. So in inference mode, a model that changes its hidden states in place between
        two layers of a group would get the product of the old states.

        Args:
            group: the group of the layer.
            x: the layer's input.
            place: the layer's number in the group.
        """
        if self._group is not group or self._x is not x or self._version != _version(x):
            return None
        # In inference mode, a second call for the same part is the only sign that x has new values.
        part, self._parts[place] = self._parts[place], None
        if part is not None:
            self.num_left -= 1
        return part


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place. If torch does not count the changes, return 0."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
