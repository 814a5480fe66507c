"""The choice of pairs: the greedy choice against an exhaustive one, and laws of the scaled prior and of balancing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups.users.answers.pairing import balanced_signs, informative_pairs, pairs_within, scaled_ridge
from personalized_soups.users.answers.prior import GaussianPrior


def random_differences(count: int, num_rewards: int, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, num_rewards)) * np.logspace(0, 1, num_rewards)


def mean_slope(mean: float, variance: float) -> float:
    """The mean of sigmoid' over a normal margin, by numerical integration."""
    z = np.linspace(-8, 8, 4001)
    margins = mean + np.sqrt(variance) * z
    density = np.exp(-(z**2) / 2)
    slopes = 0.25 / np.cosh(margins / 2) ** 2
    return float((density * slopes).sum() / density.sum())


@pytest.mark.parametrize("typical_margin", [0.5, 1.0, 3.0])
def test_margins_under_the_scaled_ridge_have_the_wanted_root_mean_square(typical_margin: float) -> None:
    differences = random_differences(300, 4)
    prior = scaled_ridge(differences, typical_margin=typical_margin)
    # the mean square of a margin is v'Cv
    squares = np.einsum("pd,de,pe->p", differences, prior.covariance, differences)
    assert np.sqrt(squares.mean()) == pytest.approx(typical_margin, rel=1e-12)
    assert (prior.mean == 0).all()
    # the scale of the rewards does not matter
    margins = scaled_ridge(1000 * differences, typical_margin=typical_margin).covariance * 1e6
    assert margins == pytest.approx(prior.covariance, rel=1e-12)


def test_pairs_are_within_prompts() -> None:
    assert pairs_within(["x", "y", "x", "x", "z"]).tolist() == [[0, 2], [0, 3], [2, 3]]
    assert pairs_within([]).shape == (0, 2)


def test_each_chosen_pair_gains_the_most_information() -> None:
    """Recompute the log determinant of the precision from scratch for every pair at every step."""
    differences = random_differences(40, 3, seed=3)
    prior = GaussianPrior(np.array([0.1, -0.2, 0.05]), np.diag([0.5, 0.1, 0.2]))
    prompts = [f"p{index % 5}" for index in range(40)]
    chosen = informative_pairs(differences, prompts, 12, prior)
    variances = np.array([v @ prior.covariance @ v for v in differences])
    large = variances >= 0.01 * variances.mean()
    precision = np.linalg.inv(prior.covariance)
    uses = dict.fromkeys(prompts, 0)
    for step, index in enumerate(chosen):
        # the package uses MacKay's approximation of the mean slope, so the gain of its choice may be a little less
        gains = {}
        for other, v in enumerate(differences):
            if other in chosen[:step] or not large[other] or uses[prompts[other]] > min(uses.values()):
                continue
            scale = 1 / np.sqrt(1 + np.pi * variances[other] / 8)
            slope = scale * 0.25 / np.cosh(scale * float(v @ prior.mean) / 2) ** 2
            gains[other] = np.linalg.slogdet(precision + slope * np.outer(v, v))[1]
        best = max(gains, key=lambda other: gains[other])
        assert index == best
        scale = 1 / np.sqrt(1 + np.pi * variances[index] / 8)
        v = differences[index]
        precision += scale * 0.25 / np.cosh(scale * float(v @ prior.mean) / 2) ** 2 * np.outer(v, v)
        uses[prompts[index]] += 1
    assert sorted(uses.values()) == [2, 2, 2, 3, 3]


@pytest.mark.parametrize(("mean", "variance"), [(0.0, 0.01), (0.0, 1.0), (1.0, 0.5), (0.0, 9.0), (-2.0, 4.0)])
def test_the_mean_slope_is_close_to_its_integral(mean: float, variance: float) -> None:
    from personalized_soups.users.answers.pairing import _mean_slopes

    got = float(_mean_slopes(np.array([mean]), np.array([variance]))[0])
    # MacKay's approximation of the mean of sigmoid is within 0.02 (his figure 2), and so is its slope over a unit step
    assert got == pytest.approx(mean_slope(mean, variance), abs=0.02)


def test_pairs_that_nobody_can_tell_apart_are_left_out() -> None:
    differences = np.array([[1.0, 0.0], [0.0, 0.0], [0.05, 0.0], [0.0, 1.0], [0.3, 0.0]])
    prompts = ["x", "x", "x", "y", "y"]
    chosen = informative_pairs(differences, prompts, 5, GaussianPrior.ridge(2))
    # the root mean square is 0.65, and a tenth of it lies between 0.05 and 0.3
    assert sorted(chosen) == [0, 3, 4]
    assert informative_pairs(np.zeros((0, 2)), [], 3, GaussianPrior.ridge(2)) == []
    assert informative_pairs(np.zeros((2, 2)), ["x", "x"], 3, GaussianPrior.ridge(2)) == []


def test_large_differences_are_not_always_chosen() -> None:
    """Everybody agrees on a huge difference, so it tells little of the direction in which it is not huge."""
    differences = np.array([[100.0, 0.0], [99.0, 0.0], [98.0, 0.0], [0.0, 1.0], [0.0, 1.1]])
    chosen = informative_pairs(differences, ["x"] * 5, 2, GaussianPrior(np.zeros(2), np.diag([1.0, 100.0])))
    assert set(chosen) & {3, 4}


@given(count=st.integers(1, 60), num_rewards=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_sum_of_balanced_unit_differences_is_short(count: int, num_rewards: int, seed: int) -> None:
    differences = random_differences(count, num_rewards, seed=seed)
    mixing = np.random.default_rng(seed).normal(size=(num_rewards, num_rewards))
    covariance = mixing @ mixing.T + np.eye(num_rewards)
    turned = balanced_signs(differences, covariance, seed)
    signed = np.where(turned[:, None], -differences, differences)
    lengths = np.sqrt(np.einsum("qd,de,qe->q", signed, covariance, signed))
    total = (signed / lengths[:, None]).sum(axis=0)
    # herding: |S + u|^2 <= |S|^2 + |u|^2 at every step, and |u| = 1
    assert total @ covariance @ total <= count * (1 + 1e-9)


def test_no_user_would_answer_one_sidedly() -> None:
    """Correlated differences, as those of opposed experts: the share of `a` is close to a half for every taste."""
    rng = np.random.default_rng(5)
    common = rng.normal(size=(200, 1)) * 4
    differences = rng.normal(size=(200, 6)) + common
    covariance = scaled_ridge(differences).covariance
    turned = balanced_signs(differences, covariance, 1)
    signed = np.where(turned[:, None], -differences, differences)
    tastes = rng.normal(size=(500, 6))
    shares = (signed @ tastes.T > 0).mean(axis=0)
    assert np.abs(shares - 0.5).max() < 0.2
    assert 60 < turned.sum() < 140
    assert (balanced_signs(differences, covariance, 1) == turned).all()
    assert (balanced_signs(differences, covariance, 2) != turned).any()
