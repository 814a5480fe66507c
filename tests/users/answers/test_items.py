"""Questions that share items."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.users.answers.items import ItemModel
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.selection import Rule, question_scores
from personalized_soups.users.answers.ties import tie_rows


def model(num_items: int = 6, num_rewards: int = 2, *, seed: int = 0, deviation: float = 0.5) -> ItemModel:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(num_rewards, num_rewards))
    prior = GaussianPrior(rng.normal(size=num_rewards), root @ root.T + 0.3 * np.eye(num_rewards))
    features = rng.normal(size=(num_items, num_rewards))
    return ItemModel(features, deviation * rng.uniform(0.5, 1.5, num_items), prior, scale=1.7, threshold=0.6)


def test_the_estimate_is_laplaces_posterior_of_the_items_rewards() -> None:
    """The oracle works with the rewards of all items, not with weights: their prior is F C F' + diag(deviations)."""
    items = model()
    pairs, labels = np.array([[0, 1], [2, 0], [3, 4], [0, 3]]), np.array([1.0, 0.5, 0.0, 1.0])
    found = items.estimate(pairs, labels)

    mean = items.features @ items.prior.mean
    cross = items.prior.covariance @ items.features.T
    covariance = items.features @ cross + np.diag(items.deviations)
    contrast = np.zeros((4, 6))
    for row, (a, b) in enumerate(pairs):
        contrast[row, a], contrast[row, b] = items.scale, -items.scale
    rows = tie_rows(contrast, labels, items.threshold)
    rewards = mean.copy()
    for _ in range(100):
        s = 1 / (1 + np.exp(-(rows.differences @ rewards + rows.offsets)))
        information = rows.differences.T @ np.diag(s * (1 - s)) @ rows.differences
        gradient = rows.differences.T @ (rows.labels - s) - np.linalg.solve(covariance, rewards - mean)
        rewards = rewards + 0.5 * np.linalg.solve(np.linalg.inv(covariance) + information, gradient)
    after = np.linalg.inv(np.linalg.inv(covariance) + information)
    # Halved steps shrink the error by 2 each: 100 steps leave 1e-30 of it. The rest is rounding.
    np.testing.assert_allclose(found.rewards, rewards, rtol=1e-9)
    np.testing.assert_allclose(found.covariance, after, atol=1e-9)
    # weights given all rewards are linear in the rewards
    gain = cross @ np.linalg.inv(covariance)
    np.testing.assert_allclose(found.weights.mean, items.prior.mean + gain @ (rewards - mean), rtol=1e-9)
    np.testing.assert_allclose(found.cross, gain @ after, atol=1e-9)
    left = items.prior.covariance - gain @ cross.T
    np.testing.assert_allclose(found.weights.covariance, left + gain @ after @ gain.T, atol=1e-9)
    assert found.weights.num_answers == 4


@pytest.mark.parametrize("rule", ["variance", "information", "prediction"])
def test_without_own_parts_and_ties_the_scores_are_those_of_independent_questions(rule: Rule) -> None:
    base = model()
    items = ItemModel(base.features, np.zeros(6), base.prior, scale=1.0, threshold=0.0)
    estimate = items.estimate(np.array([[0, 1], [2, 3]]), np.array([1.0, 0.0]))
    pairs = np.array([[0, 2], [1, 5], [4, 3]])
    differences, targets = base.features[pairs[:, 0]] - base.features[pairs[:, 1]], np.array([[1.0, 0.5], [0.2, -1.0]])
    rng = np.random.default_rng(0)
    expected = question_scores(estimate.weights, differences, rule, rng, targets_TD=targets)
    found = items.scores(estimate, pairs, rule, rng, targets_TD=targets)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_the_prediction_rule_is_the_shrinkage_of_the_targets_variances() -> None:
    """The posterior after a question with information g is known in closed form: C - g C v v' C / (1 + g v'Cv)."""
    items = model()
    estimate = items.estimate(np.array([[0, 1]]), np.array([0.5]))
    targets = np.array([[1.0, 0.5], [0.2, -1.0], [0.7, 0.7]])
    pairs = np.array([[0, 2], [1, 5], [4, 3]])
    found = items.scores(estimate, pairs, "prediction", np.random.default_rng(0), targets_TD=targets)
    for score, (a, b) in zip(found, pairs, strict=True):
        margin = items.scale * (estimate.rewards[a] - estimate.rewards[b])
        above, below = (1 / (1 + np.exp(-(margin - sign * items.threshold))) for sign in (1, -1))
        g = above * (1 - above) * below + below * (1 - below) * (1 - above)
        contrast = np.zeros(6)
        contrast[a], contrast[b] = items.scale, -items.scale
        variance = contrast @ estimate.covariance @ contrast
        reach = estimate.cross @ contrast
        expected = 0.0
        for target in targets:
            m, s2 = target @ estimate.weights.mean, target @ estimate.weights.covariance @ target
            density = np.exp(-(m**2) / (2 * s2)) / np.sqrt(s2)
            expected += density * g * (target @ reach) ** 2 / (1 + g * variance) / len(targets)
        assert score == pytest.approx(expected, rel=1e-6)


def test_a_second_question_about_an_item_is_worth_less() -> None:
    """Items 0 and 1 have the same features, so only their own parts differ."""
    base = model()
    features = base.features.copy()
    features[1] = features[0]
    items = ItemModel(features, np.full(6, 2.0), base.prior, scale=1.7, threshold=0.6)
    estimate = items.estimate(np.array([[0, 2], [0, 3]]), np.array([0.5, 0.5]))
    pairs = np.array([[0, 4], [1, 4]])
    known, fresh = items.scores(estimate, pairs, "information", np.random.default_rng(0), targets_TD=features)
    # Both compare equal features. The margin of the fresh item has the larger variance.
    assert known < fresh


def test_no_pair_is_asked_twice() -> None:
    items = model()
    pairs = np.array([[0, 1], [2, 3], [4, 5]])
    estimate, asked = items.estimate(np.zeros((0, 2), int), np.zeros(0)), list[int]()
    for _ in pairs:
        asked.append(
            items.next_pair(
                estimate,
                pairs,
                asked=asked,
                rule="prediction",
                rng=np.random.default_rng(0),
                targets_TD=items.features,
            )
        )
    assert sorted(asked) == [0, 1, 2]
    with pytest.raises(ValueError, match="every pair"):
        items.next_pair(
            estimate, pairs, asked=asked, rule="random", rng=np.random.default_rng(0), targets_TD=items.features
        )
