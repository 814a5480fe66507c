"""Estimates by expectation propagation."""

from __future__ import annotations

import numpy as np

from personalized_soups.users.answers.estimate import estimate_weights
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.propagation import propagate


def grid_moments(differences: np.ndarray, labels: np.ndarray, prior: GaussianPrior) -> tuple[np.ndarray, np.ndarray]:
    """The mean and the covariance of the posterior of two weights, by a sum over a fine grid."""
    axis = np.linspace(-12, 12, 1201)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    offset = grid - prior.mean
    log = -np.einsum("nd,de,ne->n", offset, np.linalg.inv(prior.covariance), offset) / 2
    for v, label in zip(differences, labels, strict=True):
        margin = grid @ v
        log += -label * np.logaddexp(0, -margin) - (1 - label) * np.logaddexp(0, margin)
    density = np.exp(log - log.max())
    density /= density.sum()
    mean = density @ grid
    return mean, (grid - mean).T @ ((grid - mean) * density[:, None])


def test_one_answer_gives_the_moments_of_the_posterior() -> None:
    prior = GaussianPrior(np.array([0.2, -0.1]), np.array([[1.0, 0.3], [0.3, 2.0]]))
    differences, labels = np.array([[3.0, -2.0]]), np.array([1.0])
    mean, covariance = grid_moments(differences, labels, prior)
    found = propagate(differences, labels, prior)
    # One factor is matched exactly, up to the quadrature of 40 nodes for a margin with a deviation of 4.
    np.testing.assert_allclose(found.mean, mean, atol=2e-3)
    np.testing.assert_allclose(found.covariance, covariance, atol=2e-3)


def test_intervals_hold_the_truth_more_often_than_laplaces() -> None:
    """Users are drawn from the prior, with margins that deviate by about 4, as in a pool of questions."""
    prior, rng, level = GaussianPrior.ridge(2), np.random.default_rng(4), 0.9
    inside: list[bool] = []
    inside_laplace: list[bool] = []
    for weights in prior.mean + rng.normal(size=(200, 2)):
        differences = 3 * rng.normal(size=(5, 2))
        labels = (rng.logistic(size=5) < differences @ weights).astype(float)
        for estimate, held in (
            (propagate(differences, labels, prior), inside),
            (estimate_weights(differences, labels, prior), inside_laplace),
        ):
            for axis in np.eye(2):
                low, high = estimate.interval(axis, level=level)
                held.append(low <= axis @ weights <= high)
    # 400 intervals: 4 standard errors of the share 0.9
    assert abs(np.mean(inside) - level) < 4 * np.sqrt(level * (1 - level) / 400)
    assert np.mean(inside) > np.mean(inside_laplace)


def test_no_answers_give_the_prior() -> None:
    prior = GaussianPrior.ridge(3)
    found = propagate(np.zeros((0, 3)), [], prior)
    np.testing.assert_array_equal(found.mean, prior.mean)
    np.testing.assert_array_equal(found.covariance, prior.covariance)
