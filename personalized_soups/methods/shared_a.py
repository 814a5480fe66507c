"""Experts that share A: which experts do, and where each expert's rows are if every distinct A is stored once.

K sum of the experts' ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

Item = TypeVar("Item")


def group_numbers(items: Sequence[Item], are_equal: Callable[[Item, Item], bool]) -> tuple[int, ...]:
    """Return one number per item, the same for equal items: 0, 1, ... in order of first appearance.

    Each item is compared with the first item of every group before it, so that free experts, whose first bytes differ,
    cost E^2 / 2 short comparisons.
    """
    firsts: list[Item] = []
    numbers = []
    for item in items:
        number = next((number for number, first in enumerate(firsts) if are_equal(item, first)), len(firsts))
        if number == len(firsts):
            firsts.append(item)
        numbers.append(number)
    return tuple(numbers)


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The rows of the distinct A's, stacked in order of first appearance.

    Attributes:
        firsts: for each distinct A, the position of the first expert that has it.
        row_K: for each rank of the experts, concatenated, its row in the stack.
    """

    firsts: tuple[int, ...]
    row_K: tuple[int, ...]  # noqa: N815

    @classmethod
    def of(cls, basis: Sequence[int], ranks: Sequence[int]) -> Self:
        """Return the rows of experts with these ranks; experts with the same number in `basis` share A."""
        first_row: dict[int, int] = {}
        firsts = []
        row_K: list[int] = []
        num_rows = 0
        for index, (number, rank) in enumerate(zip(basis, ranks, strict=True)):
            if number not in first_row:
                first_row[number] = num_rows
                firsts.append(index)
                num_rows += rank
            row_K.extend(range(first_row[number], first_row[number] + rank))
        return cls(tuple(firsts), tuple(row_K))
