"""The baseline of one shared reward."""

from __future__ import annotations

import numpy as np

from personalized_soups.systems.bradley_terry.model import train_bradley_terry
from personalized_soups.systems.preference_models import Comparisons


def data(seed: int = 0) -> Comparisons:
    rng = np.random.default_rng(seed)
    return Comparisons(
        3 * rng.normal(size=(30, 4)), np.arange(15), np.arange(15, 30), rng.integers(0, 2, 15), rng.integers(0, 3, 15)
    )


def test_the_reward_is_that_of_gradient_ascent() -> None:
    comparisons = data()
    differences = comparisons.differences
    x_NF = differences / np.sqrt(np.mean(differences**2))
    weights = np.zeros(4)
    for _ in range(3000):
        weights += 0.05 * (x_NF.T @ (comparisons.labels - 1 / (1 + np.exp(-x_NF @ weights))) - 0.5 * weights)
    model = train_bradley_terry(comparisons, penalty=0.5)
    found = model.known_user(0).rewards(comparisons.features)
    expected = comparisons.features / np.sqrt(np.mean(differences**2)) @ weights
    np.testing.assert_allclose(found, expected, atol=1e-9)


def test_all_users_have_one_reward() -> None:
    comparisons = data()
    model = train_bradley_terry(comparisons)
    for user in range(3):
        new = model.new_user(comparisons.of_user(user))
        np.testing.assert_array_equal(new.weights, model.known_user(user).weights)
