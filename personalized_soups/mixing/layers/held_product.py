"""The product of a group of layers, kept until each layer has taken its part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class HeldProduct:
    """The parts of a group's product that layers have not taken yet.

    Keeps the product's input alive, so that no other tensor can get the same identity.

    Attributes:
        num_left: how many parts are left.
    """

    __slots__ = ("_group", "_parts", "_version", "_x", "num_left")

    def __init__(self, group: object, x: Tensor, parts: Sequence[Tensor]) -> None:
        self._group = group
        self._x = x
        # A layer may change its input in place before the next layer reads it.
        self._version = _version(x)
        self._parts: list[Tensor | None] = list(parts)
        self.num_left = len(parts)

    def take(self, group: object, x: Tensor, place: int) -> Tensor | None:
        """Return a layer's part, once. Return None if this is the product of another group or another input.

        An input that was changed in place counts as another input. torch does not count the changes of tensors made in
        inference mode, so a model that changes its hidden states in place between two layers of a group would get the
        old product there.
        """
        if self._group is not group or self._x is not x or self._version != _version(x):
            return None
        # Once: in inference mode nothing else shows that a buffer was filled again.
        part, self._parts[place] = self._parts[place], None
        if part is not None:
            self.num_left -= 1
        return part


def _version(x: Tensor) -> int:
    """Return how often a tensor was changed in place, if torch counts that; else 0."""
    return 0 if torch.compiler.is_compiling() or x.is_inference() else x._version
