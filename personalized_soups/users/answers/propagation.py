"""Estimate weights by expectation propagation, for intervals that hold the truth as often as they say.

Laplace's method takes the curvature at the most likely weights. If margins vary by several units under the prior, the
posterior is skewed, and Laplace's intervals are too narrow. Expectation propagation (Minka 2001, arXiv:1301.2294)
matches the mean and the variance of each margin instead, so its intervals are wider, and nearer to the posterior's.

Shapes: N = answers, D = base rewards.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import Estimate
from personalized_soups.users.answers.prior import GaussianPrior

_NODES, _NODE_WEIGHTS = np.polynomial.hermite_e.hermegauss(40)
_NODE_WEIGHTS = _NODE_WEIGHTS / _NODE_WEIGHTS.sum()
_MAX_SWEEPS = 20
_SETTLED = 1e-8
_LEAST_PRECISION = 1e-10


def propagate(differences_ND: npt.ArrayLike, labels_N: npt.ArrayLike, prior: GaussianPrior) -> Estimate:
    """Return the mean and the covariance of a user's weights after N answers, by expectation propagation.

    The model is that of `estimate_weights` without noise. One sweep takes a time of order N D^2.

    Args:
        differences_ND: `phi(a) - phi(b)` of each answered question.
        labels_N: the probability that `a` is better: 1 for `a`, 0 for `b`, 0.5 for a tie.
        prior: the prior of the D weights.

    Example:
        >>> estimate = propagate([[3.0, 0.0]], [1.0], GaussianPrior.ridge(2))
        >>> round(float(estimate.mean[0]), 2)
        0.69
    """
    differences = np.asarray(differences_ND, dtype=np.float64).reshape(-1, len(prior.mean))
    labels = np.asarray(labels_N, dtype=np.float64)
    start = np.linalg.solve(prior.covariance, prior.mean)
    precision, shift = np.zeros(len(labels)), np.zeros(len(labels))  # each answer's normal factor of its margin
    mean, covariance = prior.mean.copy(), prior.covariance.copy()
    for _ in range(_MAX_SWEEPS):
        before = precision.copy()
        for at, (v, label) in enumerate(zip(differences, labels, strict=True)):
            reach = covariance @ v
            variance = float(v @ reach)
            if variance <= 0:
                continue
            # The margin without this answer is normal, with the precision `rest` and the mean `middle`.
            rest = 1 / variance - precision[at]
            if rest <= _LEAST_PRECISION:
                continue
            middle = (float(v @ mean) / variance - shift[at]) / rest
            nodes = middle + _NODES / np.sqrt(rest)
            log_likelihood = -label * np.logaddexp(0, -nodes) - (1 - label) * np.logaddexp(0, nodes)
            weights = _NODE_WEIGHTS * np.exp(log_likelihood - log_likelihood.max())
            weights /= weights.sum()
            matched = float(weights @ nodes)
            spread = float(weights @ (nodes - matched) ** 2)
            new = max(1 / spread - rest, _LEAST_PRECISION)
            change = new - precision[at]
            precision[at], shift[at] = new, matched / spread - middle * rest
            covariance = covariance - np.outer(reach, reach) * (change / (1 + change * variance))
            mean = covariance @ (start + differences.T @ shift)
        if np.max(np.abs(precision - before), initial=0.0) < _SETTLED:
            break
    return Estimate(mean, (covariance + covariance.T) / 2, len(labels))
