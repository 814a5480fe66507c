from __future__ import annotations

import operator

import pytest

from personalized_soups.methods.shared_a import SharedRows, group_numbers


def test_groups_are_numbered_in_order_of_first_appearance() -> None:
    assert group_numbers("banana", operator.eq) == (0, 1, 2, 1, 2, 1)
    assert group_numbers([], operator.eq) == ()
    assert group_numbers([0.1, 0.2, 1.1], lambda one, other: int(one) == int(other)) == (0, 0, 1)


def test_a_shared_a_has_its_rows_once() -> None:
    rows = SharedRows.of([7, 2, 7, 2], [2, 3, 2, 3])
    assert rows.firsts == (0, 1)
    assert rows.row_K == (0, 1, 2, 3, 4, 0, 1, 2, 3, 4)


def test_free_experts_keep_all_their_rows() -> None:
    rows = SharedRows.of(range(3), [1, 2, 1])
    assert rows.firsts == (0, 1, 2)
    assert rows.row_K == (0, 1, 2, 3)


def test_one_number_per_expert_is_needed() -> None:
    with pytest.raises(ValueError, match="argument"):
        SharedRows.of([0], [1, 2])
