"""Comparisons: their checks, and parts of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from personalized_soups.systems.preference_models import Comparisons, LinearReward


def test_the_parts_are_those_of_the_users() -> None:
    comparisons = Comparisons(np.eye(3), [0, 1, 2], [1, 2, 0], [1.0, 0.5, 0.0], [0, 4, 0])
    assert (len(comparisons), comparisons.num_users) == (3, 5)
    mine = comparisons.of_user(0)
    assert (mine.a.tolist(), mine.b.tolist(), mine.labels.tolist()) == ([0, 2], [1, 0], [1.0, 0.0])
    assert len(comparisons.of_user(3)) == 0
    assert comparisons.at([2, 0]).labels.tolist() == [0.0, 1.0]
    np.testing.assert_array_equal(mine.differences, [[1, -1, 0], [-1, 0, 1]])
    assert comparisons.scale == pytest.approx(np.sqrt(2 / 3))


def test_pairs_of_features_become_items() -> None:
    a, b = np.arange(6.0).reshape(3, 2), np.ones((3, 2))
    comparisons = Comparisons.of_pairs(a, b, [1, 0, 1])
    np.testing.assert_array_equal(comparisons.differences, a - b)
    assert comparisons.users.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="both must be"):
        Comparisons.of_pairs(a, b[:2], [1, 0, 1])


def test_no_comparisons_have_no_users() -> None:
    nothing = Comparisons(np.eye(2), [], [], [])
    assert (len(nothing), nothing.num_users, nothing.scale) == (0, 0, 1.0)
    assert nothing.differences.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"a": [3]}, "index"),
        ({"b": [-1]}, "index"),
        ({"labels": [1.5]}, "label"),
        ({"labels": [float("nan")]}, "label"),
        ({"users": [-1]}, "negative"),
        ({"users": [0, 1]}, "do not fit"),
        ({"features": [1.0, 2.0]}, "do not fit"),
        ({"features": [[1.0], [float("inf")], [0.0]]}, "not finite"),
    ],
)
def test_wrong_comparisons_are_refused(changes: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {"features": np.eye(3), "a": [0], "b": [1], "labels": [1.0], "users": [0]}
    with pytest.raises(ValueError, match=message):
        Comparisons(**{**fields, **changes})


def test_a_linear_reward_is_a_product() -> None:
    assert LinearReward(np.array([1.0, -2.0])).rewards(np.array([[3.0, 1.0]])).tolist() == [1.0]
