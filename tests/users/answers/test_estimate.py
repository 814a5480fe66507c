"""The estimate of weights: its maximum, its covariance and its predictions, against independent computations."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups.users.answers.estimate import (
    Estimate,
    estimate_weights,
    forgetting,
    normal_cdf,
    sigmoid,
)
from personalized_soups.users.answers.prior import GaussianPrior


def log_posterior(
    weights: np.ndarray, differences: np.ndarray, labels: np.ndarray, prior: GaussianPrior, noise: float = 0.0
) -> float:
    """The logarithm of the posterior, term by term in Python floats, up to a constant."""
    total = 0.0
    for difference, label in zip(differences, labels, strict=True):
        margin = math.fsum(float(w) * float(v) for w, v in zip(weights, difference, strict=True))
        p = noise + (1 - 2 * noise) / (1 + math.exp(-margin))
        total += float(label) * math.log(p) + (1 - float(label)) * math.log(1 - p)
    offset = weights - prior.mean
    return total - 0.5 * float(offset @ np.linalg.solve(prior.covariance, offset))


def curvature(differences: np.ndarray, labels: np.ndarray, prior: GaussianPrior, at: np.ndarray) -> np.ndarray:
    """The negative Hessian of the log posterior by central differences."""
    num, step = len(at), 1e-4
    hessian = np.zeros((num, num))
    for i in range(num):
        for j in range(num):
            signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
            values = []
            for a, b in signs:
                moved = at.copy()
                moved[i] += a * step
                moved[j] += b * step
                values.append(log_posterior(moved, differences, labels, prior))
            hessian[i, j] = -(values[0] - values[1] - values[2] + values[3]) / (4 * step**2)
    return hessian


def problem(seed: int, *, num_answers: int = 12, num_rewards: int = 3) -> tuple[np.ndarray, np.ndarray, GaussianPrior]:
    rng = np.random.default_rng(seed)
    differences = rng.normal(size=(num_answers, num_rewards))
    labels = rng.choice([0.0, 0.5, 1.0], size=num_answers)
    root = rng.normal(size=(num_rewards, num_rewards))
    prior = GaussianPrior(rng.normal(size=num_rewards), root @ root.T + 0.3 * np.eye(num_rewards))
    return differences, labels, prior


@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seed", range(4))
def test_the_mean_is_the_maximum_of_the_posterior(seed: int, noise: float) -> None:
    differences, labels, prior = problem(seed)
    estimate = estimate_weights(differences, labels, prior, noise=noise)
    # at a maximum, a central difference of step h is an error of O(h^2) times the third derivative, below 1e-7 here
    for axis in np.eye(3):
        up, down = (log_posterior(estimate.mean + h * axis, differences, labels, prior, noise) for h in (1e-4, -1e-4))
        assert abs(up - down) / 2e-4 < 1e-6
        best = log_posterior(estimate.mean, differences, labels, prior, noise)
        assert best >= max(up, down)


@pytest.mark.parametrize("seed", range(4))
def test_the_covariance_is_the_inverse_curvature(seed: int) -> None:
    differences, labels, prior = problem(seed)
    estimate = estimate_weights(differences, labels, prior)
    expected = np.linalg.inv(curvature(differences, labels, prior, estimate.mean))
    # central differences with step 1e-4 lose eps / step^2 = 2e-8 of values around 10
    np.testing.assert_allclose(estimate.covariance, expected, rtol=1e-4, atol=1e-5)


def test_no_answers_give_the_prior() -> None:
    _, _, prior = problem(5)
    estimate = estimate_weights(np.zeros((0, 3)), [], prior)
    np.testing.assert_allclose(estimate.mean, prior.mean, rtol=1e-12)
    np.testing.assert_allclose(estimate.covariance, prior.covariance, rtol=1e-9)
    assert estimate.num_answers == 0


def test_a_tie_counts_as_half_an_answer_for_each_side() -> None:
    differences, _, prior = problem(6)
    ties = estimate_weights(differences, np.full(12, 0.5), prior)
    both = estimate_weights(
        np.concatenate([differences, differences]), np.r_[np.ones(12), np.zeros(12)], prior, counts_N=np.full(24, 0.5)
    )
    np.testing.assert_allclose(ties.mean, both.mean, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(ties.covariance, both.covariance, rtol=1e-9)


def test_swapping_the_answers_of_a_question_changes_nothing() -> None:
    differences, labels, prior = problem(7)
    swapped = estimate_weights(-differences, 1 - labels, prior)
    np.testing.assert_allclose(swapped.mean, estimate_weights(differences, labels, prior).mean, rtol=1e-9, atol=1e-12)


def test_an_answer_that_counts_nothing_is_ignored() -> None:
    differences, labels, prior = problem(8)
    counts = np.ones(12)
    counts[3] = 0
    kept = np.delete(np.arange(12), 3)
    with_zero = estimate_weights(differences, labels, prior, counts_N=counts)
    without = estimate_weights(differences[kept], labels[kept], prior)
    np.testing.assert_allclose(with_zero.mean, without.mean, rtol=1e-9, atol=1e-12)
    assert with_zero.num_answers == without.num_answers == 11


def test_a_covariance_with_an_eigenvalue_below_0_by_rounding_is_sampled() -> None:
    estimate = Estimate(np.zeros(2), np.diag([1.0, -1e-7]), 1)
    samples = estimate.samples(1000, np.random.default_rng(0))
    # the second direction has a standard deviation of at most sqrt(1e-7)
    assert np.abs(samples[:, 1]).max() < 5 * 1e-7**0.5
    assert 0.8 < samples[:, 0].std() < 1.2


def test_noise_holds_the_weights_back() -> None:
    differences = np.array([[1.0], [1.0], [1.0], [-1.0]])
    prior = GaussianPrior.ridge(1, penalty=0.1)
    # three answers agree, and one contradicts: with noise, the contradiction may be a slip
    labels = [1.0, 1.0, 1.0, 1.0]
    plain, noisy = (estimate_weights(differences, labels, prior, noise=noise) for noise in (0.0, 0.2))
    assert noisy.mean[0] > 0
    assert noisy.covariance[0, 0] > plain.covariance[0, 0]


@given(
    scale=st.sampled_from([1e-6, 1.0, 1e3, 1e6]),
    penalty=st.sampled_from([1e-8, 1.0, 1e6]),
    same=st.booleans(),
    num_answers=st.integers(1, 30),
)
def test_extreme_answers_stay_finite(scale: float, penalty: float, same: bool, num_answers: int) -> None:
    """Separable answers have no maximum without a prior; equal or huge differences must not break the solver."""
    rng = np.random.default_rng(0)
    differences = scale * (np.ones((num_answers, 2)) if same else rng.normal(size=(num_answers, 2)))
    prior = GaussianPrior.ridge(2, penalty=penalty)
    estimate = estimate_weights(differences, np.ones(num_answers), prior)
    assert np.isfinite(estimate.mean).all()
    variances = np.linalg.eigvalsh(estimate.covariance)
    assert variances[-1] > 0
    assert variances[0] >= -1e-14 * variances[-1]  # a ratio below 1e-16 is lost to rounding
    assert np.isfinite(estimate.samples(3, rng)).all()
    start = log_posterior_at(np.zeros(2), differences, prior)
    assert log_posterior_at(estimate.mean, differences, prior) >= start


def log_posterior_at(weights: np.ndarray, differences: np.ndarray, prior: GaussianPrior) -> float:
    margins = differences @ weights
    penalty = weights @ np.linalg.solve(prior.covariance, weights) / 2
    return float(-np.logaddexp(0, -margins).sum() - penalty)


def test_more_answers_never_make_the_estimate_less_certain() -> None:
    differences, labels, prior = problem(9)
    # fixed weights, so that only the number of answers changes the information
    volumes = []
    for count in range(13):
        estimate = estimate_weights(1e-6 * differences[:count], labels[:count], prior)
        volumes.append(np.linalg.slogdet(estimate.covariance)[1])
    assert all(later <= earlier + 1e-9 for earlier, later in pairwise(volumes))


def test_an_interval_has_its_level() -> None:
    estimate = Estimate(np.array([1.0, -2.0]), np.array([[0.5, 0.2], [0.2, 0.8]]), 4)
    direction = np.array([1.0, -1.0])
    low, high = estimate.interval(direction, level=0.9)
    drawn = estimate.samples(200_000, np.random.default_rng(0)) @ direction
    # the standard error of a share of 0.9 of 200,000 draws is 0.0007
    assert np.mean((drawn > low) & (drawn < high)) == pytest.approx(0.9, abs=0.003)
    assert (low + high) / 2 == pytest.approx(3.0)


def test_predicted_preferences_average_over_the_uncertain_weights() -> None:
    estimate = Estimate(np.array([1.0, 0.5]), np.array([[1.5, -0.3], [-0.3, 0.7]]), 4)
    differences = np.array([[2.0, 1.0], [-1.0, 0.5], [0.0, 0.0]])
    drawn = estimate.samples(400_000, np.random.default_rng(1)) @ differences.T
    # MacKay's approximation is within 0.01 of the integral for variances up to a few units
    np.testing.assert_allclose(estimate.preference(differences), sigmoid(drawn).mean(axis=0), atol=0.012)
    right = (drawn > 0) == (differences @ estimate.mean > 0)
    expected = [right[:, 0].mean(), right[:, 1].mean(), 0.5]
    np.testing.assert_allclose(estimate.agreement(differences), expected, atol=0.004)


def test_the_expected_agreement_does_not_depend_on_the_scale() -> None:
    differences, labels, prior = problem(10)
    estimate = estimate_weights(differences, labels, prior)
    larger = Estimate(7 * estimate.mean, 49 * estimate.covariance, 12)
    np.testing.assert_allclose(larger.agreement(differences), estimate.agreement(3 * differences), rtol=1e-12)


def test_intervals_hold_the_truth_for_users_of_the_prior() -> None:
    """Users whose weights are drawn from the prior and who answer with the logistic model: 90% means 90%."""
    rng = np.random.default_rng(11)
    prior = GaussianPrior(np.array([0.5, 0.0, -0.5]), np.array([[1.0, 0.3, 0.0], [0.3, 1.0, 0.0], [0.0, 0.0, 0.5]]))
    held = []
    for _ in range(400):
        truth = rng.multivariate_normal(prior.mean, prior.covariance)
        differences = rng.normal(size=(10, 3))
        labels = (rng.random(10) < sigmoid(differences @ truth)).astype(float)
        estimate = estimate_weights(differences, labels, prior)
        for direction in np.eye(3):
            low, high = estimate.interval(direction, level=0.9)
            held.append(low <= direction @ truth <= high)
    # 1200 intervals, of which three of a user are dependent: the standard error is below 0.015
    assert np.mean(held) == pytest.approx(0.9, abs=0.045)


def test_forgetting_follows_a_user_who_changes() -> None:
    differences = np.ones((20, 1))
    labels = np.r_[np.ones(12), np.zeros(8)]
    prior = GaussianPrior.ridge(1)
    steady = estimate_weights(differences, labels, prior)
    recent = estimate_weights(differences, labels, prior, counts_N=forgetting(20, 0.2))
    assert steady.mean[0] > 0 > recent.mean[0]
    assert recent.covariance[0, 0] > steady.covariance[0, 0]
    np.testing.assert_allclose(forgetting(3, 0.5), [0.25, 0.5, 1.0])
    np.testing.assert_array_equal(forgetting(4, 0.0), np.ones(4))


def test_sigmoid_and_normal_distribution() -> None:
    values = np.array([-800.0, -1.0, 0.0, 1.0, 800.0])
    np.testing.assert_allclose(sigmoid(values), [0.0, 1 / (1 + math.e), 0.5, math.e / (1 + math.e), 1.0], rtol=1e-15)
    np.testing.assert_allclose(normal_cdf(np.array([0.0, 1.959963984540054])), [0.5, 0.975], rtol=1e-12)


@pytest.mark.parametrize(
    ("differences", "labels", "options", "message"),
    [
        ([[1.0, 0.0]], [1.0, 0.0], {}, "do not fit"),
        ([[1.0, math.nan]], [1.0], {}, "not finite"),
        ([[1.0, 0.0]], [1.5], {}, r"not in \[0, 1\]"),
        ([[1.0, 0.0]], [1.0], {"counts_N": [-1.0]}, "negative"),
        ([[1.0, 0.0]], [1.0], {"noise": 0.5}, "noise is 0.5"),
    ],
)
def test_wrong_arguments_are_rejected(
    differences: list[list[float]], labels: list[float], options: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        estimate_weights(differences, labels, GaussianPrior.ridge(2), **options)  # type: ignore[arg-type]
