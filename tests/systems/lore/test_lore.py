"""LoRe: the weights, the loss, dropped rewards, the reference, and users who mix two tastes."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.errors import UsageError
from personalized_soups.systems.bradley_terry.model import train_bradley_terry
from personalized_soups.systems.lore.model import LoreModel
from personalized_soups.systems.lore.training import LoreSettings, train_lore
from personalized_soups.systems.preference_models import Comparisons


def mixed_tastes(seed: int, *, num_users: int = 20, num_each: int = 60) -> tuple[Comparisons, Comparisons]:
    """Training and held-out comparisons of users who mix two opposed-in-part rewards of 8 features, without noise."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(200, 8))
    rewards_FJ, shares = rng.normal(size=(8, 2)), rng.random(num_users)
    tastes_FU = rewards_FJ @ np.stack([shares, 1 - shares])
    parts = []
    for _ in range(2):
        users = np.repeat(np.arange(num_users), num_each)
        a = rng.integers(0, 200, len(users))
        b = (a + rng.integers(1, 200, len(users))) % 200
        labels = np.einsum("nf,fn->n", features[a] - features[b], tastes_FU[:, users]) > 0
        parts.append(Comparisons(features, a, b, labels, users))
    return parts[0], parts[1]


def accuracy(margins: np.ndarray[tuple[int, ...], np.dtype[np.float64]], comparisons: Comparisons) -> float:
    return float(np.mean((margins > 0) == (comparisons.labels > 0.5)))


def test_users_are_convex_combinations_and_predict_better_than_one_reward() -> None:
    training, held_out = mixed_tastes(0)
    model, shared = train_lore(training, LoreSettings(rank=4)), train_bradley_terry(training)
    assert (model.users >= 0).all()
    np.testing.assert_allclose(model.users.sum(axis=1), 1)
    assert model.losses[-1] < 0.3 * model.losses[0]
    scores = []
    for each in (model, shared):
        margins = [held_out.differences[i] @ each.known_user(user).weights for i, user in enumerate(held_out.users)]
        scores.append(accuracy(np.array(margins), held_out))
    assert scores[0] > 0.93
    assert scores[0] > scores[1] + 0.05


def test_a_new_user_needs_a_few_comparisons() -> None:
    training, held_out = mixed_tastes(0)
    model = train_lore(training.at(training.users < 15), LoreSettings(rank=4, steps=300))
    before, after = [], []
    for user in range(15, 20):
        mine, test = training.of_user(user), held_out.of_user(user)
        before.append(accuracy(test.differences @ model.new_user(mine.at([])).weights, test))
        after.append(accuracy(test.differences @ model.new_user(mine.at(np.arange(10))).weights, test))
        weights = model.weights(mine)
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
    assert np.mean(after) > 0.85
    assert np.mean(after) > np.mean(before)


def test_the_first_loss_is_that_of_a_loop() -> None:
    training, _ = mixed_tastes(1, num_users=3, num_each=5)
    mine = training.at(np.arange(12))  # user 2 has 2 comparisons, the others 5
    model = train_lore(mine, LoreSettings(rank=1, steps=1, rate=1e-12, temperature=2.0))
    # with one base reward every weight is 1, and the tiny step leaves the vectors at their start
    expected = 0.0
    for user in range(3):
        own = mine.of_user(user)
        margins = own.differences @ model.vectors[:, 0]
        expected += float(np.mean(np.logaddexp(0, np.where(own.labels > 0.5, -margins, margins))))
    assert model.losses[0] == pytest.approx(expected, rel=1e-9)
    assert model.users.tolist() == [[1.0]] * 3


def test_new_weights_minimise_the_likelihood() -> None:
    """Two base rewards have one free weight, so a grid finds the minimum."""
    rng = np.random.default_rng(0)
    model = LoreModel(rng.normal(size=(6, 2)), np.array([[0.5, 0.5], [0.2, 0.8]]))
    x_NF = rng.normal(size=(400, 6))
    labels = rng.random(400) < 1 / (1 + np.exp(-x_NF @ model.vectors @ np.array([0.6, 0.4])))
    share = np.linspace(0, 1, 10_001)
    margins = (x_NF @ model.vectors) @ np.stack([share, 1 - share])
    losses = np.mean(np.logaddexp(0, np.where(labels[:, None], -margins, margins)), axis=0)
    weights = model.weights(Comparisons.of_pairs(x_NF, 0 * x_NF, labels))
    assert weights[0] == pytest.approx(share[np.argmin(losses)], abs=1e-3)
    assert 0.01 < weights[0] < 0.99


def test_without_comparisons_a_new_user_is_the_mean_user() -> None:
    model = LoreModel(np.eye(2), np.array([[0.5, 0.5], [0.3, 0.7]]))
    nobody = Comparisons(np.eye(2), [], [], [])
    np.testing.assert_allclose(model.weights(nobody), [0.4, 0.6])


def test_unused_base_rewards_are_dropped() -> None:
    training, _ = mixed_tastes(0)
    every = train_lore(training, LoreSettings(rank=8, steps=300, least_weight=0.0))
    most = every.users.max(axis=0)
    threshold = float(np.sort(most)[3])
    some = train_lore(training, LoreSettings(rank=8, steps=300, least_weight=threshold))
    np.testing.assert_array_equal(some.vectors, every.vectors[:, most >= threshold])
    np.testing.assert_allclose(some.users.sum(axis=1), 1)


def test_a_reference_pulls_all_base_rewards_towards_itself() -> None:
    training, _ = mixed_tastes(0)
    reference = np.random.default_rng(5).normal(size=8)
    settings = LoreSettings(rank=3, steps=300, least_weight=0.0)
    free, held = train_lore(training, settings), train_lore(training, settings, reference=reference)

    def cosines(model: LoreModel) -> list[float]:
        norms = np.linalg.norm(model.vectors, axis=0) * np.linalg.norm(reference)
        return list(reference @ model.vectors / norms)

    assert min(cosines(held)) > 0.99
    assert min(cosines(free)) < 0.9


def test_the_seed_and_the_unit_of_the_features() -> None:
    training, _ = mixed_tastes(0)
    settings = LoreSettings(rank=2, steps=20)
    first, second = train_lore(training, settings), train_lore(training, settings)
    assert first.vectors.tobytes() == second.vectors.tobytes()
    other = train_lore(training, LoreSettings(rank=2, steps=20, seed=1))
    assert np.abs(other.vectors - first.vectors).max() > 1e-6
    inches = Comparisons(training.features * 39.37, training.a, training.b, training.labels, training.users)
    np.testing.assert_allclose(train_lore(inches, settings).vectors * 39.37, first.vectors, rtol=1e-6)


def test_the_prior_of_equal_users_is_narrow() -> None:
    model = LoreModel(np.eye(2), np.array([[0.5, 0.5], [0.5, 0.5]]))
    assert model.prior.mean.tolist() == [0.5, 0.5]
    assert model.prior.covariance[0, 0] < 1e-5


def test_bad_input_is_refused() -> None:
    with pytest.raises(UsageError, match="no comparisons"):
        train_lore(Comparisons(np.eye(2), [], [], []))
    with pytest.raises(ValueError, match="rank"):
        LoreSettings(rank=0)
    with pytest.raises(ValueError, match="temperature"):
        LoreSettings(temperature=0.0)
