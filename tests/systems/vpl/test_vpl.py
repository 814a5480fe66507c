"""VPL: the parts against NumPy, and the toy of two opposed users."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from personalized_soups.errors import UsageError
from personalized_soups.systems.bradley_terry.model import train_bradley_terry
from personalized_soups.systems.preference_models import Comparisons, PreferenceModel
from personalized_soups.systems.vpl.model import VplModel, oriented_pairs
from personalized_soups.systems.vpl.networks import Encoder
from personalized_soups.systems.vpl.training import (
    VplSettings,
    distinct,
    divergence,
    divergence_factor,
    rate_factor,
    rescaled,
    train_vpl,
)

Floats = NDArray[np.float64]
NUM_FEATURES = 16


def comparisons(reward_F: Floats, num: int, rng: np.random.Generator) -> Comparisons:
    """Comparisons of user 0, who has the reward, and of user 1, who has the opposite. Labels are Bernoulli."""
    a, b = rng.standard_normal((num, NUM_FEATURES)), rng.standard_normal((num, NUM_FEATURES))
    users = rng.integers(0, 2, num)
    margins = ((a - b) @ reward_F) * (1 - 2 * users)
    return Comparisons.of_pairs(a, b, rng.random(num) < 1 / (1 + np.exp(-margins)), users)


@cache
def trained(seed: int) -> tuple[Floats, Comparisons, VplModel]:
    rng = np.random.default_rng(seed)
    reward_F = 2 * rng.standard_normal(NUM_FEATURES)
    training = comparisons(reward_F, 20_000, rng)
    return reward_F, training, train_vpl(training, VplSettings(seed=seed))


def accuracy(model: PreferenceModel, reward_F: Floats, *, num_context: int, flipped: bool = False) -> float:
    """The share of fresh noise-free pairs in the right order, over 100 draws of a new user and the user's context."""
    rng, scores = np.random.default_rng(7), []
    for draw in range(100):
        taste = reward_F * (1 - 2 * (draw % 2))
        a, b = rng.standard_normal((2, num_context, NUM_FEATURES))
        labels = rng.random(num_context) < 1 / (1 + np.exp(-(a - b) @ taste))
        user = model.new_user(Comparisons.of_pairs(a, b, labels != flipped))
        first, second = rng.standard_normal((2, 100, NUM_FEATURES))
        scores.append(np.mean((user.rewards(first) > user.rewards(second)) == ((first - second) @ taste > 0)))
    return float(np.mean(scores))


def test_a_context_tells_opposed_users_apart() -> None:
    """A quick version of the figures below: fewer steps, and so a wider bound."""
    rng = np.random.default_rng(0)
    reward_F = 2 * rng.standard_normal(NUM_FEATURES)
    training = comparisons(reward_F, 5000, rng)
    model = train_vpl(training, VplSettings(steps=300))
    assert accuracy(model, reward_F, num_context=8) > 0.95
    assert accuracy(model, reward_F, num_context=8, flipped=True) < 0.05
    held_out = comparisons(reward_F, 200, rng).features
    for user, sign in ((0, 1), (1, -1)):
        rewards = model.known_user(user).rewards(held_out)
        assert sign * np.corrcoef(rewards, held_out @ reward_F)[0, 1] > 0.9


@pytest.mark.slow
def test_the_published_figures() -> None:
    figures = []
    for seed in range(3):
        reward_F, training, model = trained(seed)
        figures.append(
            [
                accuracy(model, reward_F, num_context=8),
                accuracy(model, reward_F, num_context=2),
                accuracy(model, reward_F, num_context=8, flipped=True),
                accuracy(train_bradley_terry(training), reward_F, num_context=8),
            ]
        )
    np.testing.assert_allclose(np.mean(figures, axis=0), [0.992, 0.963, 0.010, 0.499], atol=0.02)


def leaky(x: Floats) -> Floats:
    return np.where(x > 0, x, 0.2 * x)


def test_the_encoder_is_the_attention_written_out() -> None:
    torch.manual_seed(0)
    encoder = Encoder(3, 5, 4).double()
    weights = {name: tensor.detach().numpy() for name, tensor in encoder.named_parameters()}

    def linear(name: str, x: Floats) -> Floats:
        return np.asarray(x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"])

    pairs = np.random.default_rng(0).standard_normal((6, 6))
    hidden = linear("pair.4", leaky(linear("pair.2", leaky(linear("pair.0", pairs)))))
    scores = linear("query", hidden) @ linear("key", hidden).T / np.sqrt(4)
    attention = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    whole = (attention @ linear("value", hidden)).mean(axis=0)
    mean, log_variance = encoder(torch.tensor(pairs)[None])
    np.testing.assert_allclose(mean[0].detach(), np.clip(linear("mean", whole), -1, 1), atol=1e-12)
    np.testing.assert_allclose(log_variance[0].detach(), np.clip(linear("log_variance", whole), -1, 1), atol=1e-12)
    shuffled, _ = encoder(torch.tensor(pairs[::-1].copy())[None])
    np.testing.assert_allclose(shuffled.detach(), mean.detach(), atol=1e-12)


def test_the_divergence_is_that_of_a_sum_over_a_grid() -> None:
    mean, log_variance = 0.7, -0.4
    z, step = np.linspace(-15, 15, 200_001, retstep=True)
    log_q = -0.5 * (np.log(2 * np.pi) + log_variance + (z - mean) ** 2 / np.exp(log_variance))
    log_p = -0.5 * (np.log(2 * np.pi) + z**2)
    expected = np.sum(np.exp(log_q) * (log_q - log_p)) * step
    one = torch.tensor([[mean]], dtype=torch.float64), torch.tensor([[log_variance]], dtype=torch.float64)
    assert float(divergence(*one)) == pytest.approx(expected, rel=1e-6)


def test_latent_vectors_are_rescaled_to_the_norm_of_a_draw() -> None:
    z = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    np.testing.assert_allclose(rescaled(z), [[1.2, 0.0, 1.6, 0.0], [0.0, 0.0, 0.0, 0.0]], rtol=1e-6)


def test_the_schedules() -> None:
    assert [divergence_factor(step, 100) for step in (0, 50, 100)] == pytest.approx([0.1, 0.55, 0.1])
    assert divergence_factor(99, 100) > 0.99
    factors = [rate_factor(step, 100) for step in range(100)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[3:] == sorted(factors[3:], reverse=True)
    assert factors[-1] < 0.01


def test_contexts_are_distinct_and_every_subset_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    drawn = distinct(np.full(12_000, 4), 2, rng)
    counts = np.unique(drawn, axis=0, return_counts=True)
    assert counts[0].tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    # each of 6 subsets has the probability 1/6: the standard deviation of its count is 41
    np.testing.assert_allclose(counts[1], 2000, atol=5 * 41)
    few = distinct(np.array([1, 2]), 3, rng)
    assert few[0].tolist() == [0, 0, 0]
    assert few.max() <= 1


def test_pairs_begin_with_the_preferred_item_and_leave_out_ties() -> None:
    mine = Comparisons(np.array([[1.0], [2.0], [3.0]]), [0, 0, 1], [1, 2, 2], [1.0, 0.5, 0.2])
    assert oriented_pairs(mine).tolist() == [[1.0, 2.0], [3.0, 2.0]]


def test_the_seed_gives_the_training_and_leaves_the_callers_random_numbers() -> None:
    training = comparisons(np.ones(NUM_FEATURES), 50, np.random.default_rng(0))
    settings = VplSettings(steps=3, batch_size=8)
    torch.manual_seed(5)
    first, second = train_vpl(training, settings), train_vpl(training, settings)
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    assert first.losses == second.losses
    assert first.losses != train_vpl(training, VplSettings(steps=3, batch_size=8, seed=1)).losses


def test_nobody_has_the_mean_of_the_prior() -> None:
    training = comparisons(np.ones(NUM_FEATURES), 50, np.random.default_rng(0))
    model = train_vpl(training, VplSettings(steps=3, batch_size=8))
    assert model.new_user(training.at([])).z.tolist() == [0.0] * 8


def test_a_user_with_one_comparison_is_named() -> None:
    lonely = Comparisons(np.eye(3), [0, 1, 0], [1, 2, 2], [1, 0, 1], [0, 0, 1])
    with pytest.raises(UsageError, match="user 1 has fewer than two"):
        train_vpl(lonely)
    with pytest.raises(UsageError, match="no comparisons"):
        train_vpl(Comparisons(np.eye(3), [], [], []))
    with pytest.raises(ValueError, match="at least 1"):
        VplSettings(steps=0)
