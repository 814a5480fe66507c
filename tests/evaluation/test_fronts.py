"""Fronts and hypervolumes, against moocore and against the definition."""

from __future__ import annotations

from typing import Any

import moocore
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups.evaluation.fronts import hypervolume, pareto_front


@st.composite
def tables(draw: st.DrawFn) -> npt.NDArray[np.float64]:
    """Draw points on a coarse grid, so that many are equal in an objective or as a whole."""
    num, dimensions = draw(st.integers(1, 14)), draw(st.integers(2, 4))
    rng = np.random.default_rng(draw(st.integers(0, 9999)))
    return rng.integers(-2, 9, size=(num, dimensions)) / 8


@given(points=tables())
def test_the_front_and_its_volume_are_those_of_moocore(points: npt.NDArray[np.float64]) -> None:
    reference = np.zeros(points.shape[1])
    theirs = moocore.filter_dominated(points, maximise=True)
    assert pareto_front(points).tolist() == sorted(theirs.tolist())
    expected = moocore.hypervolume(points, ref=reference, maximise=True)
    # sums of at most a few hundred products of numbers below 2
    assert hypervolume(points, reference) == pytest.approx(expected, abs=1e-12)
    assert hypervolume(pareto_front(points), reference) == pytest.approx(expected, abs=1e-12)


def test_the_volume_is_the_share_of_random_points_below_the_front() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(size=(6, 3))
    drawn = rng.uniform(size=(20_000, 3))
    below = np.all(drawn[:, None, :] <= points[None, :, :], axis=2)
    share = float(np.mean(np.any(below, axis=1)))
    # four standard deviations of a share of 20,000
    assert hypervolume(points, np.zeros(3)) == pytest.approx(share, abs=4 * 0.5 / 20_000**0.5)


def test_points_that_are_not_above_the_reference_add_nothing() -> None:
    assert hypervolume([[2.0, 0.5], [0.5, 2.0]], [1.0, 1.0]) == 0.0
    assert hypervolume([[2.0, 3.0], [9.0, 1.0]], [1.0, 1.0]) == 2.0
    assert hypervolume([[3.0]], [1.0]) == 2.0


@pytest.mark.parametrize("points", [[], [[]], [1.0, 2.0], [[float("nan"), 1.0]], [[float("inf"), 1.0]]])
def test_other_points_are_rejected(points: Any) -> None:
    with pytest.raises(ValueError, match="table of finite numbers"):
        pareto_front(points)


@pytest.mark.parametrize("reference", [[0.0], [0.0, 0.0, 0.0], [0.0, float("nan")]])
def test_another_reference_is_rejected(reference: list[float]) -> None:
    with pytest.raises(ValueError, match="the reference has the shape"):
        hypervolume([[1.0, 1.0]], reference)
