"""Experts that share A: which experts have equal A's, and where their rows are if each distinct A is stored once.

Shapes: K = sum of the experts' ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

Item = TypeVar("Item")


def group_numbers(items: Sequence[Item], are_equal: Callable[[Item, Item], bool]) -> tuple[int, ...]:
    """Return one number per item: 0, 1, ... in order of first appearance. Equal items have equal numbers.

    Each item is compared with the first item of every earlier group. For E experts that share no A, that makes E^2 / 2
    comparisons, which are short because the first bytes already differ.
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
        firsts: for each distinct A, the index of the first expert that has this A.
        row_K: for each row of each expert's A, in the order of the experts, the index of this row in the stack.
    """

    firsts: tuple[int, ...]
    row_K: tuple[int, ...]  # noqa: N815

    @classmethod
    def of(cls, basis: Sequence[int], ranks: Sequence[int]) -> Self:
        """Return the stacked rows of experts with the given ranks.

        Experts with equal numbers in `basis` share A.
        """
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
