"""Measure whether the answers of a user agree with each other.

Shapes: N = answers, D = base rewards.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import estimate_weights, sigmoid
from personalized_soups.users.answers.prior import GaussianPrior


def left_out_probability(differences_ND: npt.ArrayLike, labels_N: npt.ArrayLike, prior: GaussianPrior) -> float:
    """Return how well each answer is predicted from all others: the mean probability that they give to it.

    The estimate without answer i is approximated by one Newton step from the estimate with it: with the margin f, its
    variance h, and the residual r and information g of the answer, the margin without it is `f - r h / (1 - g h)`, and
    its variance is `h / (1 - g h)` (leave-one-out formula of ridge regression, at the last Newton step).

    Active questions are those whose answers are hard to predict, so even a user without error gets about 0.67 after 10
    answers on the tiny base. A user who answers at random gets about 0.6.

    Args:
        differences_ND: `phi(a) - phi(b)` of each answered question, at least one.
        labels_N: 1 for `a`, 0 for `b`. Leave ties out.
        prior: the prior of the D weights.
    """
    differences, labels = np.asarray(differences_ND, dtype=np.float64), np.asarray(labels_N, dtype=np.float64)
    estimate = estimate_weights(differences, labels, prior)
    margins = differences @ estimate.mean
    variances = np.einsum("nd,de,ne->n", differences, estimate.covariance, differences)
    residuals, information = labels - sigmoid(margins), sigmoid(margins) * sigmoid(-margins)
    rest = np.maximum(1 - information * variances, 1e-12)
    means, spreads = margins - residuals * variances / rest, variances / rest
    probabilities = sigmoid(means / np.sqrt(1 + np.pi * spreads / 8))  # as in `Estimate.preference`
    return float(np.mean(np.where(labels == 1, probabilities, 1 - probabilities)))
