"""Ties as answers of their own."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.users.answers.estimate import estimate_weights
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.ties import expected_information, tie_rows


def probabilities(margin: float, threshold: float) -> tuple[float, float, float]:
    """The probabilities of `a`, `b` and a tie, as Rao and Kupper define them: worths pi_a, pi_b and theta = exp(t)."""
    worth, theta = np.exp(margin), np.exp(threshold)
    first = worth / (worth + theta)
    second = 1 / (1 + theta * worth)
    return float(first), float(second), float(1 - first - second)


def test_the_estimate_maximises_the_likelihood_of_rao_and_kupper() -> None:
    rng = np.random.default_rng(3)
    differences, labels, threshold = rng.normal(size=(9, 2)), rng.choice([0.0, 0.5, 1.0], size=9), 0.8
    assert (labels == 0.5).any()
    prior = GaussianPrior(np.array([0.3, -0.2]), np.array([[1.0, 0.4], [0.4, 2.0]]))
    rows = tie_rows(differences, labels, threshold)
    found = estimate_weights(rows.differences, rows.labels, prior, offsets_N=rows.offsets)

    def log_posterior(weights: np.ndarray) -> float:
        total = -(weights - prior.mean) @ np.linalg.inv(prior.covariance) @ (weights - prior.mean) / 2
        for v, label in zip(differences, labels, strict=True):
            total += np.log(probabilities(v @ weights, threshold)[{1.0: 0, 0.0: 1, 0.5: 2}[label]])
        return float(total)

    # The gradient by central differences vanishes at the estimate, and their Hessian is the inverse of the covariance.
    # A step of 1e-4 has an error of about 1e-16 / 1e-8 + 1e-8 for second differences.
    step, unit = 1e-4, np.eye(2)
    gradient = [
        (log_posterior(found.mean + step * e) - log_posterior(found.mean - step * e)) / (2 * step) for e in unit
    ]
    np.testing.assert_allclose(gradient, 0, atol=1e-6)
    hessian = [
        [
            (
                log_posterior(found.mean + step * (d + e))
                - log_posterior(found.mean + step * (d - e))
                - log_posterior(found.mean - step * (d - e))
                + log_posterior(found.mean - step * (d + e))
            )
            / (4 * step**2)
            for e in unit
        ]
        for d in unit
    ]
    np.testing.assert_allclose(np.linalg.inv(-np.array(hessian)), found.covariance, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 2.0])
def test_the_expected_information_is_the_mean_curvature_over_the_answers(threshold: float) -> None:
    step = 1e-3  # second differences of the logarithm have an error of order step^2
    for margin in (-2.0, -0.3, 0.0, 1.1):
        near = [probabilities(margin + at * step, threshold) for at in (-1, 0, 1)]
        expected = 0.0
        for kind in range(3):
            if near[1][kind] > 1e-12:
                low, here, high = (np.log(p[kind]) for p in near)
                expected -= near[1][kind] * (low - 2 * here + high) / step**2
        assert expected_information([margin], threshold)[0] == pytest.approx(expected, abs=1e-5)


def test_answers_without_ties_and_threshold_are_unchanged() -> None:
    rows = tie_rows([[1.0, 2.0], [3.0, 4.0]], [1.0, 0.0], 0.0)
    assert rows.differences.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert rows.labels.tolist() == [1.0, 0.0]
    assert not rows.offsets.any()


def test_no_answers_give_no_rows() -> None:
    assert tie_rows(np.zeros((0, 3)), [], 1.0).differences.shape == (0, 3)


@pytest.mark.parametrize(("labels", "threshold", "words"), [([0.7], 1.0, "label"), ([1.0], -0.1, "threshold")])
def test_other_labels_and_negative_thresholds_are_rejected(labels: list[float], threshold: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tie_rows([[1.0]], labels, threshold)
