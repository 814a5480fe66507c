"""Estimate the mean and the covariance of a user's weights by expectation propagation.

Laplace's method (`estimate_weights`) puts a normal distribution at the most likely weights. With few answers and a wide
prior, the true distribution is skewed, so the most likely weights are not its mean, and 90% intervals hold only about
85% of the true weights. Expectation propagation (Minka 2001, arXiv:1301.2294) matches the mean and the variance of each
answer's margin instead. Its intervals hold about 90%.

Shapes: N = answers, D = base rewards, K = nodes of an integral.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import Estimate, check_answers, estimate_weights, log_likelihood
from personalized_soups.users.answers.prior import Floats, GaussianPrior

# Integrals over a margin use equally spaced nodes over 8 standard deviations each way. The trapezoidal rule is accurate
# to 1e-4 while the spacing is below 2, as sigmoid has no pole within pi of the real line: up to deviations of 16.
_NODES_K = np.linspace(-8.0, 8.0, 129)
_WEIGHTS_K = np.exp(-(_NODES_K**2) / 2)
_MAX_SWEEPS = 50
_TOLERANCE = 1e-4
# New sites are mixed with old ones, because all sites are updated at once.
_STEP = 0.8
_LEAST_PRECISION = 1e-12


def propagate(
    differences_ND: npt.ArrayLike,
    labels_N: npt.ArrayLike,
    prior: GaussianPrior,
    *,
    counts_N: npt.ArrayLike | None = None,
    noise: float = 0.0,
) -> Estimate:
    """Return the approximate posterior mean and covariance of a user's weights after N answers.

    The arguments, the model and the errors are those of `estimate_weights`. All answers are updated at once in each
    sweep. Ten sweeps are usual, and 40 answers take about 3 ms. If the sweeps do not converge, which noise could cause,
    the result is that of `estimate_weights`.

    Example:
        >>> prior = GaussianPrior.ridge(2)
        >>> estimate = propagate([[1.0, 0.0], [1.0, 1.0]], [1.0, 1.0], prior)
        >>> [round(float(weight), 2) for weight in estimate.mean]
        [0.67, 0.32]
    """
    labels = np.asarray(labels_N, dtype=np.float64)
    counts = np.ones(len(labels)) if counts_N is None else np.asarray(counts_N, dtype=np.float64)
    differences = np.asarray(differences_ND, dtype=np.float64).reshape(-1, len(prior.mean))
    check_answers(differences, labels, counts, np.zeros_like(labels), noise)
    found = _propagated(differences, labels, prior, counts=counts, noise=noise)
    return found or estimate_weights(differences, labels, prior, counts_N=counts, noise=noise)


def _propagated(
    differences: Floats, labels: Floats, prior: GaussianPrior, *, counts: Floats, noise: float
) -> Estimate | None:
    """Return the estimate, or None if there are no answers or the sweeps do not converge."""
    if not len(labels):
        return None
    # As in `estimate_weights`: w = mean + L z, and the prior of z is N(0, 1).
    root = np.linalg.cholesky(prior.covariance)
    design, offsets = differences @ root, differences @ prior.mean
    precisions, shifts = np.zeros(len(labels)), np.zeros(len(labels))
    for _ in range(_MAX_SWEEPS):
        mean, covariance = _gaussian(design, precisions, shifts)
        variances = np.einsum("nd,de,ne->n", design, covariance, design)
        is_open = variances > 0  # other answers have no difference in any reward
        variances = np.where(is_open, variances, 1.0)
        # the margin of each answer without the answer itself
        cavity_precisions = 1 / variances - precisions
        if not (cavity_precisions > 0).all():
            return None
        cavity_means = ((design @ mean) / variances - shifts) / cavity_precisions
        tilted_means, tilted_variances = _tilted(
            cavity_means, 1 / cavity_precisions, offsets, labels, counts=counts, noise=noise
        )
        new_precisions = np.maximum(1 / tilted_variances - cavity_precisions, _LEAST_PRECISION) * is_open
        new_shifts = (tilted_means / tilted_variances - cavity_means * cavity_precisions) * is_open
        change = max(
            float(np.abs(new_precisions - precisions).max() / (1 + np.abs(precisions).max())),
            float(np.abs(new_shifts - shifts).max() / (1 + np.abs(shifts).max())),
        )
        precisions += _STEP * (new_precisions - precisions)
        shifts += _STEP * (new_shifts - shifts)
        if not np.isfinite(change):
            return None
        if change < _TOLERANCE:
            break
    else:
        return None
    mean, covariance = _gaussian(design, precisions, shifts)
    covariance = root @ covariance @ root.T
    return Estimate(prior.mean + root @ mean, (covariance + covariance.T) / 2, int(np.count_nonzero(counts)))


def _gaussian(design: Floats, precisions: Floats, shifts: Floats) -> tuple[Floats, Floats]:
    """Return the mean and the covariance of the product of N(0, 1) and the answers' normal approximations."""
    _, singular, rows = np.linalg.svd(np.sqrt(precisions)[:, None] * design, full_matrices=False)
    covariance = np.eye(design.shape[1]) - (rows.T * (singular**2 / (1 + singular**2))) @ rows
    return covariance @ (design.T @ shifts), covariance


def _tilted(
    means: Floats, variances: Floats, offsets: Floats, labels: Floats, *, counts: Floats, noise: float
) -> tuple[Floats, Floats]:
    """Return the means and variances of normal margins, each multiplied by the likelihood of its answer.

    The integrals are computed by the trapezoidal rule.
    """
    deviations = np.sqrt(variances)
    margins_NK = means[:, None] + deviations[:, None] * _NODES_K + offsets[:, None]
    logs_NK = counts[:, None] * log_likelihood(margins_NK, labels[:, None], noise)
    mass_NK = _WEIGHTS_K * np.exp(logs_NK - logs_NK.max(axis=1, keepdims=True))
    mass_NK /= mass_NK.sum(axis=1, keepdims=True)
    centres = mass_NK @ _NODES_K
    spreads = np.maximum(mass_NK @ _NODES_K**2 - centres**2, 1e-12)
    return means + deviations * centres, variances * spreads
