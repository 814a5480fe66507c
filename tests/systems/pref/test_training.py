"""The joint likelihood, its maximum, and what training returns."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from personalized_soups.errors import UsageError
from personalized_soups.systems.pref.likelihood import JointLikelihood
from personalized_soups.systems.pref.start import Start, random_start
from personalized_soups.systems.pref.training import PrefSettings, rotated, train_pref
from personalized_soups.systems.preference_models import Comparisons
from personalized_soups.users.answers.prior import GaussianPrior

Floats = NDArray[np.float64]


def comparisons(seed: int = 0, num: int = 200, num_users: int = 8, num_items: int = 20) -> Comparisons:
    """Noisy labels of users with two tastes, on items with 4 features. Some labels are ties."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_items, 4))
    a = rng.integers(0, num_items, num)
    b = (a + rng.integers(1, num_items, num)) % num_items
    users = np.arange(num) % num_users
    tastes = rng.normal(size=(num_users, 2)) @ rng.normal(size=(2, 4))
    margins = np.sum((features[a] - features[b]) * tastes[users], axis=1)
    labels = (rng.random(num) < 1 / (1 + np.exp(-margins))).astype(float)
    labels[::10] = 0.5
    return Comparisons(features, a, b, labels, users)


def slow_loss(data: Comparisons, users: Floats, vectors: Floats, rho: float, nu: float, *, fixed_first: bool) -> float:
    """The penalised negative log likelihood, comparison by comparison."""
    total = 0.0
    for x, user, y in zip(data.differences, data.users, data.labels, strict=True):
        p = 1 / (1 + np.exp(-float(users[user] @ (x @ vectors))))
        total -= y * np.log(p) + (1 - y) * np.log(1 - p)
    return (
        total + rho / 2 * float(np.sum(users[:, 1 if fixed_first else 0 :] ** 2)) + nu / 2 * float(np.sum(vectors**2))
    )


@pytest.mark.parametrize("fixed_first", [False, True])
def test_the_loss_is_that_of_a_loop(fixed_first: bool) -> None:
    data = comparisons()
    start = random_start(data, 3, np.random.default_rng(1), fixed_first=fixed_first)
    likelihood = JointLikelihood.of(data, users_penalty=0.7, vectors_penalty=0.3, fixed_first=fixed_first)
    value = likelihood(torch.tensor(start.users), torch.tensor(start.vectors))
    expected = slow_loss(data, start.users, start.vectors, 0.7, 0.3, fixed_first=fixed_first)
    assert float(value) == pytest.approx(expected, rel=1e-12)


def scaled(data: Comparisons) -> Comparisons:
    return Comparisons(data.features / data.scale, data.a, data.b, data.labels, data.users)


@pytest.mark.parametrize("fixed_first", [False, True])
def test_training_ends_at_a_maximum(fixed_first: bool) -> None:
    """At the end, no small move of the users or of the base rewards lowers the loss of the loop above."""
    data = comparisons()
    model = train_pref(data, PrefSettings(rank=3, fixed_first=fixed_first, max_steps=2000))
    users, vectors = model.users, model.vectors * data.scale

    def loss(u: Floats, v: Floats) -> float:
        return slow_loss(scaled(data), u, v, 1.0, 1.0, fixed_first=fixed_first)

    best, rng, size = loss(users, vectors), np.random.default_rng(2), 1e-3
    assert best == pytest.approx(model.losses[-1], rel=1e-9)
    for _ in range(20):
        move_u, move_v = size * rng.normal(size=users.shape), size * rng.normal(size=vectors.shape)
        if fixed_first:
            move_u[:, 0] = 0
        # the first order of the loss vanishes: what is left is of order size^2, and positive but for rounding
        assert loss(users + move_u, vectors + move_v) > best - 1e-9 * best
    assert not fixed_first or (users[:, 0] == 1).all()


def test_two_starts_reach_the_same_predictions() -> None:
    """With the penalties, the loss bounds the nuclear norm of users x rewards: its minimum at full rank is unique."""
    data = comparisons()
    models = [
        train_pref(data, PrefSettings(rank=4, start=start, max_steps=5000))
        for start in ("labels", "regressions", "random")
    ]
    predicted = [model.users @ model.vectors.T for model in models]
    np.testing.assert_allclose(predicted[1], predicted[0], atol=1e-3)
    np.testing.assert_allclose(predicted[2], predicted[0], atol=1e-3)


def test_training_twice_gives_the_same_bytes() -> None:
    first, second = (train_pref(comparisons(), PrefSettings(rank=2)) for _ in range(2))
    assert first.vectors.tobytes() == second.vectors.tobytes()
    assert first.users.tobytes() == second.users.tobytes()


def test_the_unit_of_the_features_does_not_matter() -> None:
    data = comparisons()
    inches = Comparisons(data.features * 39.37, data.a, data.b, data.labels, data.users)
    model, other = train_pref(data, PrefSettings(rank=2)), train_pref(inches, PrefSettings(rank=2))
    np.testing.assert_allclose(other.vectors * 39.37, model.vectors, rtol=1e-4, atol=1e-6)


def test_rotation_keeps_the_margins_and_orders_the_rewards() -> None:
    rng = np.random.default_rng(0)
    fitted = Start(rng.normal(size=(9, 3)), rng.normal(size=(5, 3)))
    users, vectors = rotated(fitted)
    np.testing.assert_allclose(users @ vectors.T, fitted.users @ fitted.vectors.T, atol=1e-12)
    for factors in (users, vectors):
        gram = factors.T @ factors
        np.testing.assert_allclose(gram, np.diag(np.diag(gram)), atol=1e-12)
        assert list(np.diag(gram)) == sorted(np.diag(gram), reverse=True)
    np.testing.assert_allclose(np.diag(users.T @ users), np.diag(vectors.T @ vectors), atol=1e-12)
    assert (vectors.max(axis=0) >= -vectors.min(axis=0)).all()
    # more base rewards than features: the last ones are 0
    assert not rotated(Start(rng.normal(size=(9, 3)), rng.normal(size=(2, 3)))).vectors[:, 2].any()


def test_the_prior_is_that_of_the_known_users() -> None:
    data = comparisons()
    model = train_pref(data, PrefSettings(rank=2))
    np.testing.assert_array_equal(model.prior.mean, GaussianPrior.fit(model.users).mean)
    nobody = data.at([])
    np.testing.assert_allclose(model.new_user(nobody).weights, model.vectors @ model.users.mean(axis=0), rtol=1e-6)


def test_a_shared_first_reward_keeps_its_weight_for_new_users() -> None:
    data = comparisons()
    model = train_pref(data, PrefSettings(rank=3, fixed_first=True))
    weights = model.estimate(data.of_user(0)).mean
    assert weights[0] == pytest.approx(1, abs=1e-3)
    assert np.abs(weights[1:] - model.prior.mean[1:]).max() > 0.1


def test_a_new_user_with_the_answers_of_a_known_user_gets_a_similar_reward() -> None:
    data = comparisons(num=1600)
    model = train_pref(data, PrefSettings(rank=2))
    for user in range(8):
        found, expected = (
            model.new_user(data.of_user(user)).rewards(data.features), model.known_user(user).rewards(data.features)
        )  # fmt: skip
        assert np.corrcoef(found, expected)[0, 1] > 0.99


def test_one_user_is_refused() -> None:
    with pytest.raises(UsageError, match="there are 1"):
        train_pref(comparisons(num_users=1))


@pytest.mark.parametrize("settings", [{"rank": 0}, {"users_penalty": -1.0}, {"rank": 1, "fixed_first": True}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"rank|penalty"):
        PrefSettings(**settings)  # type: ignore[arg-type]
