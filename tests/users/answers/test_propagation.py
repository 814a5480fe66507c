"""Posterior means and covariances, against sums over a fine grid of weights."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from personalized_soups.users.answers.estimate import Estimate, estimate_weights, sigmoid
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.propagation import propagate


def exact_moments(
    differences: np.ndarray, labels: np.ndarray, prior: GaussianPrior, *, counts: np.ndarray, noise: float
) -> tuple[np.ndarray, np.ndarray]:
    """The posterior mean and covariance of two weights: sums over a grid of 9 prior standard deviations each way."""
    root = np.linalg.cholesky(prior.covariance)
    axis = np.linspace(-9, 9, 901)
    z = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    weights = prior.mean + z @ root.T
    margins = weights @ differences.T
    won, lost = (
        np.logaddexp(np.log(noise), np.log1p(-2 * noise) - np.logaddexp(0, -sign * margins))
        if noise
        else -np.logaddexp(0, -sign * margins)
        for sign in (1, -1)
    )
    logs = (counts * (labels * won + (1 - labels) * lost)).sum(axis=1) - (z**2).sum(axis=1) / 2
    mass = np.exp(logs - logs.max())
    mass /= mass.sum()
    mean = mass @ weights
    centred = weights - mean
    return mean, (centred * mass[:, None]).T @ centred


def problem(seed: int, num_answers: int) -> tuple[np.ndarray, np.ndarray, GaussianPrior]:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(2, 2))
    prior = GaussianPrior(rng.normal(size=2), 4 * root @ root.T + 0.5 * np.eye(2))
    differences = rng.normal(size=(num_answers, 2))
    truth = rng.multivariate_normal(prior.mean, prior.covariance)
    labels = (rng.random(num_answers) < sigmoid(differences @ truth)).astype(float)
    return differences, labels, prior


@pytest.mark.parametrize("num_answers", [1, 3, 10, 25])
@pytest.mark.parametrize("seed", range(3))
def test_the_moments_are_those_of_the_posterior(seed: int, num_answers: int) -> None:
    differences, labels, prior = problem(seed, num_answers)
    mean, covariance = exact_moments(differences, labels, prior, counts=np.ones(num_answers), noise=0.0)
    got = propagate(differences, labels, prior)
    deviations = np.sqrt(np.diagonal(covariance))
    if num_answers == 1:  # exact up to the quadrature
        assert np.all(np.abs(got.mean - mean) <= 0.01 * deviations)
        np.testing.assert_allclose(got.covariance, covariance, atol=0.01 * deviations.max() ** 2)
        return
    # With more answers, it is an approximation, whose mean is much closer than the most likely weights are.
    assert np.all(np.abs(got.mean - mean) <= 0.06 * deviations)
    np.testing.assert_allclose(got.covariance, covariance, atol=0.25 * deviations.max() ** 2)


def test_the_mean_is_closer_to_that_of_the_posterior_than_the_most_likely_weights_are() -> None:
    errors = []
    for seed in range(12):
        differences, labels, prior = problem(seed, 4)
        mean, covariance = exact_moments(differences, labels, prior, counts=np.ones(4), noise=0.0)
        found = [method(differences, labels, prior) for method in (estimate_weights, propagate)]
        errors.append([np.abs((each.mean - mean) / np.sqrt(np.diagonal(covariance))).max() for each in found])
    laplace, matched = np.mean(errors, axis=0)
    assert laplace > 0.15
    assert matched < 0.02


@pytest.mark.parametrize("options", [{"counts_N": np.array([1.0, 0.25, 0.0, 0.5, 1.0])}, {"noise": 0.1}])
def test_counts_ties_and_noise(options: dict[str, Any]) -> None:
    differences, _, prior = problem(4, 5)
    labels = np.array([1.0, 0.5, 0.0, 0.3, 1.0])
    counts = options.get("counts_N", np.ones(5))
    mean, covariance = exact_moments(differences, labels, prior, counts=counts, noise=options.get("noise", 0.0))
    got = propagate(differences, labels, prior, **options)
    deviations = np.sqrt(np.diagonal(covariance))
    assert np.all(np.abs(got.mean - mean) <= 0.08 * deviations)
    np.testing.assert_allclose(got.covariance, covariance, atol=0.12 * deviations.max() ** 2)


def test_intervals_hold_the_truth_under_a_wide_prior() -> None:
    """Six weights, of which pairs are nearly opposite, and margins around 4: where Laplace's method holds 85%."""
    rng = np.random.default_rng(5)
    prior = GaussianPrior.ridge(6, penalty=6 / 16)
    held: dict[str, list[bool]] = {"laplace": [], "moments": []}
    for _ in range(250):
        truth = rng.multivariate_normal(prior.mean, prior.covariance)
        low = rng.normal(size=(8, 3))
        differences = np.concatenate([low, -low + 0.3 * rng.normal(size=(8, 3))], axis=1)
        labels = (rng.random(8) < sigmoid(differences @ truth)).astype(float)
        found: list[tuple[str, Estimate]] = [
            ("laplace", estimate_weights(differences, labels, prior)),
            ("moments", propagate(differences, labels, prior)),
        ]
        for name, estimate in found:
            for side in range(3):
                direction = np.zeros(6)
                direction[side], direction[side + 3] = 1.0, -1.0
                lowest, highest = estimate.interval(direction, level=0.9)
                held[name].append(lowest <= float(direction @ truth) <= highest)
    # 750 intervals: a standard error of about 0.013
    assert np.mean(held["moments"]) == pytest.approx(0.9, abs=0.04)
    assert np.mean(held["laplace"]) < np.mean(held["moments"]) - 0.02


def test_no_answers_and_answers_without_a_difference_give_the_prior() -> None:
    _, _, prior = problem(6, 1)
    for differences, labels in ((np.zeros((0, 2)), []), (np.zeros((3, 2)), [1.0, 0.0, 1.0])):
        estimate = propagate(differences, labels, prior)
        np.testing.assert_allclose(estimate.mean, prior.mean, rtol=1e-9)
        np.testing.assert_allclose(estimate.covariance, prior.covariance, rtol=1e-9)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e4])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_extreme_answers_stay_finite(scale: float, noise: float) -> None:
    rng = np.random.default_rng(7)
    differences = scale * rng.normal(size=(30, 3))
    estimate = propagate(differences, rng.integers(0, 2, size=30), GaussianPrior.ridge(3, penalty=1e-4), noise=noise)
    assert np.isfinite(estimate.mean).all()
    assert np.linalg.eigvalsh(estimate.covariance)[-1] > 0
