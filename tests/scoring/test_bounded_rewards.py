"""Base rewards that are squashed into (-1, 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest

from personalized_soups.scoring.bounded_rewards import BoundedRewards, typical_bounds


class Lengths:
    """Two rewards of a text: its number of letters, and of exclamation marks."""

    names = ("letters", "marks")
    digest = "1"

    def features(self, items: Sequence[str], /) -> npt.NDArray[np.float64]:
        return np.array([[sum(map(str.isalpha, item)), item.count("!")] for item in items], dtype=np.float64)


def test_rewards_are_squashed_around_their_centres() -> None:
    rewards = BoundedRewards(Lengths(), centres=[4.0, 1.0], scales=[2.0, 0.5])
    expected = [[math.tanh((3 - 4) / 2), math.tanh((2 - 1) / 0.5)], [math.tanh((8 - 4) / 2), math.tanh(-1 / 0.5)]]
    np.testing.assert_allclose(rewards.features(["wow!!", "dust off."[:4] + "with"]), expected, rtol=1e-15)
    assert rewards.names == ("letters", "marks")


def test_the_order_of_each_reward_stays() -> None:
    features = np.random.default_rng(0).normal(size=(50, 2)) * [3.0, 0.1]
    rewards = BoundedRewards(Lengths(), centres=[0.5, 0.0], scales=[2.0, 0.2])
    np.testing.assert_array_equal(np.argsort(rewards.bounded(features), axis=0), np.argsort(features, axis=0))


def test_an_extreme_answer_moves_neither_the_bounds_nor_its_own_reward_beyond_one() -> None:
    features = np.random.default_rng(1).normal(size=(200, 2))
    with_outlier = np.vstack([features, [1e6, -1e6]])
    plain, extreme = typical_bounds(features), typical_bounds(with_outlier)
    np.testing.assert_allclose(extreme, plain, atol=0.05)
    squashed = BoundedRewards(Lengths(), centres=extreme[0], scales=extreme[1]).bounded(with_outlier)
    assert np.abs(squashed).max() <= 1
    # 70% of a normal distribution are within 1.036 standard deviations
    np.testing.assert_allclose(plain[1], 1.036, atol=0.15)


def test_a_reward_that_is_always_equal_stays_finite() -> None:
    centres, scales = typical_bounds(np.full((5, 2), 3.0))
    np.testing.assert_array_equal(centres, [3.0, 3.0])
    np.testing.assert_array_equal(scales, [1.0, 1.0])


def test_the_digest_depends_on_the_bounds() -> None:
    digests = {
        BoundedRewards(Lengths(), centres=centres, scales=scales).digest
        for centres, scales in [([0.0, 0.0], [1.0, 1.0]), ([0.0, 0.5], [1.0, 1.0]), ([0.0, 0.0], [1.0, 2.0])]
    }
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("centres", "scales"), [([0.0], [1.0, 1.0]), ([0.0, 0.0], [1.0, 0.0]), ([math.nan, 0.0], [1.0, 1.0])]
)
def test_wrong_bounds_are_rejected(centres: list[float], scales: list[float]) -> None:
    with pytest.raises(ValueError, match="must"):
        BoundedRewards(Lengths(), centres=centres, scales=scales)
