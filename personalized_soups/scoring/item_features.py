"""`ItemFeatures`: numbers that describe an item, from which rewards are learned.

Shapes: N = items, F = features.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from personalized_soups.errors import UsageError, choose_from

Item_contra = TypeVar("Item_contra", contravariant=True)
Item = TypeVar("Item", bound=Hashable)


class ItemFeatures(Protocol[Item_contra]):
    """Features of items."""

    @property
    def digest(self) -> str:
        """A hex digest that changes when the features of an item may change."""
        ...

    def features(self, items: Sequence[Item_contra], /) -> npt.NDArray[np.float64]:
        """Return [N, F], float64: the features of each item."""
        ...


class ItemTable(Generic[Item]):
    """A feature for each item of a list: 1 for the item and 0 for all others.

    A reward that is linear in these features is a free number for each item. Use it for items that nothing else is
    known about, such as the statements of a questionnaire.

    Args:
        items: the items, each once.

    Raises:
        ValueError: if an item occurs twice.

    Example:
        >>> ItemTable(["I like parties.", "I worry."]).features(["I worry."]).tolist()
        [[0.0, 1.0]]
    """

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = tuple(items)
        self._index = {item: number for number, item in enumerate(self.items)}
        if len(self._index) != len(self.items):
            raise ValueError("an item occurs twice")

    @property
    def digest(self) -> str:
        """A hex digest of the items, in their order."""
        return str(blake3("\0".join(["item table 1", *map(repr, self.items)]).encode()).hexdigest())

    def features(self, items: Sequence[Item], /) -> npt.NDArray[np.float64]:
        """Return [N, F], float64: a row of the identity matrix for each item.

        Raises:
            UsageError: if an item is not in the table.
        """
        unknown = [item for item in items if item not in self._index]
        if unknown:
            raise UsageError(
                f"the item {unknown[0]!r} is not in the table",
                where="items",
                mend=choose_from(str(unknown[0]), map(str, self.items)),
            )
        rows = np.zeros((len(items), len(self.items)))
        rows[np.arange(len(items)), [self._index[item] for item in items]] = 1.0
        return rows
