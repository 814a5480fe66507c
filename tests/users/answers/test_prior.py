"""Priors of known users' weights."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.errors import UsageError
from personalized_soups.users.answers.prior import GaussianPrior


def test_a_ridge_prior_has_variance_one_over_the_penalty() -> None:
    prior = GaussianPrior.ridge(3, penalty=4.0)
    np.testing.assert_array_equal(prior.mean, np.zeros(3))
    np.testing.assert_array_equal(prior.covariance, np.eye(3) / 4)


def test_many_users_give_their_own_mean_and_covariance() -> None:
    rng = np.random.default_rng(0)
    covariance = np.array([[1.0, 0.6], [0.6, 2.0]])
    weights = rng.multivariate_normal([1.0, -1.0], covariance, size=50_000)
    prior = GaussianPrior.fit(weights)
    # a sample covariance of 50,000 users has a standard error of about 2 sqrt(2 / 50,000) = 0.013
    np.testing.assert_allclose(prior.covariance, covariance, atol=0.05)
    np.testing.assert_allclose(prior.mean, [1.0, -1.0], atol=0.03)


def test_few_users_give_a_covariance_closer_to_the_truth_than_their_sample() -> None:
    """The purpose of shrinking, measured: on average over 200 draws of 6 users with 5 weights."""
    rng = np.random.default_rng(1)
    truth = np.diag([1.0, 1.2, 0.8, 1.0, 1.1])
    errors = []
    for _ in range(200):
        weights = rng.multivariate_normal(np.zeros(5), truth, size=6)
        sample = np.cov(weights.T, bias=True)
        shrunk = GaussianPrior.fit(weights).covariance
        assert np.linalg.eigvalsh(shrunk)[0] > 0
        errors.append([np.sum((sample - truth) ** 2), np.sum((shrunk - truth) ** 2)])
    sample_error, shrunk_error = np.mean(errors, axis=0)
    assert shrunk_error < 0.6 * sample_error


def test_fewer_users_than_weights_still_give_a_positive_definite_covariance() -> None:
    prior = GaussianPrior.fit([[1.0, 0.0, 0.0, 2.0], [0.0, 1.0, 0.0, 2.0]])
    assert np.linalg.eigvalsh(prior.covariance)[0] > 0


def test_some_of_the_weights_have_the_marginal_distribution() -> None:
    prior = GaussianPrior(np.array([1.0, 2.0, 3.0]), np.array([[2.0, 0.5, 0.1], [0.5, 1.0, 0.2], [0.1, 0.2, 3.0]]))
    part = prior.restricted([2, 0])
    np.testing.assert_array_equal(part.mean, [3.0, 1.0])
    np.testing.assert_array_equal(part.covariance, [[3.0, 0.1], [0.1, 2.0]])


@pytest.mark.parametrize("weights", [[[1.0, 2.0]], [[1.0, 1.0], [1.0, 1.0]], [1.0, 2.0]])
def test_users_that_give_no_covariance_are_rejected(weights: list[float]) -> None:
    with pytest.raises(UsageError, match=r"prior|covariance"):
        GaussianPrior.fit(weights)


def test_a_covariance_that_is_no_covariance_is_rejected() -> None:
    with pytest.raises(ValueError, match="positive definite"):
        GaussianPrior(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]))
    with pytest.raises(ValueError, match="shape"):
        GaussianPrior(np.zeros(2), np.eye(3))
    with pytest.raises(ValueError, match="greater than 0"):
        GaussianPrior.ridge(2, penalty=0)
