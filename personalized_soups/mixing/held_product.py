"""The product of a group of layers, kept until each layer has taken its part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HeldProduct:
    """What one product gave for the layers of a group, until each has taken its part.

    It holds its input, so that no other tensor can have the same identity meanwhile.
    """

    __slots__ = ("_group", "_parts", "_version", "_x", "num_left")

    def __init__(self, group: object, x: Tensor, parts: Sequence[Tensor]) -> None:
        self._group = group
        self._x = x
        self._version = _version(x)
        self._parts: list[Tensor | None] = list(parts)
        self.num_left = len(parts)

    def take(self, group: object, x: Tensor, place: int) -> Tensor | None:
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


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place, as far as that is counted."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
