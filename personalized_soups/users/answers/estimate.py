"""Estimate one user's reward weights from answers, with a measure of certainty.

The log posterior is maximised with Newton's method, and its curvature at the maximum gives the covariance (Laplace's
method). The model and the choice of base rewards are those of PReF (arXiv:2503.06358).

Shapes: N = answers, D = base rewards, S = samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import erf, sqrt
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.prior import Floats, GaussianPrior

_MAX_STEPS = 100
_MAX_HALVINGS = 40


@dataclass(frozen=True, slots=True)
class Estimate:
    """The reward weights of a user after some answers: a normal distribution.

    Attributes:
        mean: [D], float64, the most likely weights.
        covariance: [D, D], float64.
        num_answers: the number of answers that the estimate is based on.

    Example:
        >>> estimate = estimate_weights([[1.0, -1.0]], [1.0], GaussianPrior.ridge(2))
        >>> low, high = estimate.interval([1.0, -1.0])
        >>> low < 0 < high
        True
    """

    mean: Floats
    covariance: Floats
    num_answers: int

    def interval(self, direction_D: npt.ArrayLike, *, level: float = 0.9) -> tuple[float, float]:
        """Return the interval that holds `direction . w` with probability `level`.

        Opposite sides of a dimension are nearly collinear, so their single weights stay uncertain. Ask for their
        difference: a direction with 1 at one side and -1 at the other.
        """
        direction = np.asarray(direction_D, dtype=np.float64)
        middle = float(direction @ self.mean)
        half = NormalDist().inv_cdf((1 + level) / 2) * float(np.sqrt(direction @ self.covariance @ direction))
        return middle - half, middle + half

    def preference(self, differences_ND: npt.ArrayLike) -> Floats:
        """Return [N]: the probability that the user prefers `a`, for the differences `phi(a) - phi(b)`.

        The probability is averaged over the uncertain weights by MacKay's approximation (1992, "The evidence framework
        applied to classification networks"): `sigmoid(m / sqrt(1 + pi v / 8))` for a margin with mean m and variance v.
        """
        mean, variance = self._margins(differences_ND)
        return sigmoid(mean / np.sqrt(1 + np.pi * variance / 8))

    def agreement(self, differences_ND: npt.ArrayLike) -> Floats:
        """Return [N]: the probability that the predicted better answer is the one that the true weights prefer.

        For a margin with mean m and variance v, this is `Phi(|m| / sqrt(v))`. It does not depend on the scale of the
        weights, and it does not count the noise in the user's own answers.
        """
        mean, variance = self._margins(differences_ND)
        certain = variance <= 1e-300  # a difference of 0 in every reward
        ratio = np.abs(mean) / np.sqrt(np.where(certain, 1.0, variance))
        return np.where(certain, 0.5, normal_cdf(ratio))

    def samples(self, count: int, rng: np.random.Generator) -> Floats:
        """Return [S, D]: weights that are drawn from the estimate."""
        # If scales differ by many orders of magnitude, rounding makes eigenvalues slightly negative.
        return rng.multivariate_normal(self.mean, self.covariance, size=count, method="eigh", check_valid="ignore")

    def _margins(self, differences_ND: npt.ArrayLike) -> tuple[Floats, Floats]:
        differences = np.asarray(differences_ND, dtype=np.float64)
        variance = np.einsum("nd,de,ne->n", differences, self.covariance, differences)
        return differences @ self.mean, np.maximum(variance, 0.0)


def estimate_weights(
    differences_ND: npt.ArrayLike,
    labels_N: npt.ArrayLike,
    prior: GaussianPrior,
    *,
    counts_N: npt.ArrayLike | None = None,
    offsets_N: npt.ArrayLike | None = None,
    noise: float = 0.0,
) -> Estimate:
    """Return the estimate of a user's reward weights after N answers.

    With `p = noise + (1 - 2 noise) sigmoid(w . v + offset)`, it maximises

        sum_i counts_i (y_i log p_i + (1 - y_i) log(1 - p_i)) - (w - mean)' covariance^-1 (w - mean) / 2

    by Newton's method with the Fisher information and step halving. Each step raises the objective. The covariance of
    the estimate is the inverse of the information at the maximum.

    Args:
        differences_ND: `phi(a) - phi(b)` of each answered question.
        labels_N: the probability that `a` is better: 1 for `a`, 0 for `b`, 0.5 for a tie.
        prior: the prior of the D weights.
        counts_N: how much each answer counts, at least 0. See `forgetting`. By default, each answer counts 1.
        offsets_N: a known part of each margin, such as the threshold of a tie (see `ties`). By default, it is 0.
        noise: the probability that the user presses the wrong button, in [0, 0.5).

    Raises:
        ValueError: if shapes do not fit, or a label, a count or the noise is out of range.

    Example:
        >>> prior = GaussianPrior.ridge(2)
        >>> estimate = estimate_weights([[1.0, 0.0], [1.0, 1.0]], [1.0, 1.0], prior)
        >>> [round(float(weight), 3) for weight in estimate.mean]
        [0.632, 0.285]
    """
    num_rewards = len(prior.mean)
    differences = np.asarray(differences_ND, dtype=np.float64).reshape(-1, num_rewards)
    labels = np.asarray(labels_N, dtype=np.float64)
    counts = np.ones(len(labels)) if counts_N is None else np.asarray(counts_N, dtype=np.float64)
    known = np.zeros(len(labels)) if offsets_N is None else np.asarray(offsets_N, dtype=np.float64)
    check_answers(differences, labels, counts, known, noise)
    # With w = mean + L z and covariance = L L', the prior of z is N(0, 1), whatever the units of the rewards are.
    root = np.linalg.cholesky(prior.covariance)
    design = differences @ root
    offsets = differences @ prior.mean + known

    def objective(z: Floats) -> float:
        return float(counts @ log_likelihood(offsets + design @ z, labels, noise) - z @ z / 2)

    z = np.zeros(num_rewards)
    value = objective(z)
    for _ in range(_MAX_STEPS):
        slope, information = _derivatives(offsets + design @ z, labels, noise)
        gradient = design.T @ (counts * slope) - z
        step = _inverse_information(design, counts * information) @ gradient
        decrement = float(gradient @ step)
        if decrement <= 1e-14 * max(1.0, abs(value)):
            # The objective's rounding hides a smaller gain. Newton's method squares the error, so one more step is
            # exact to rounding.
            z = z + step if objective(z + step) >= value else z
            break
        for _ in range(_MAX_HALVINGS):
            candidate = objective(z + step)
            if candidate >= value + 1e-4 * float(gradient @ step):
                break
            step = step / 2
        else:  # no step raises the objective, so the maximum is reached to rounding
            break
        z, value = z + step, candidate
    _, information = _derivatives(offsets + design @ z, labels, noise)
    covariance = root @ _inverse_information(design, counts * information) @ root.T
    return Estimate(prior.mean + root @ z, (covariance + covariance.T) / 2, int(np.count_nonzero(counts)))


def _inverse_information(design: Floats, information: Floats) -> Floats:
    """Return `(1 + design' diag(information) design)^-1`, [D, D].

    The singular values of `diag(sqrt(information)) design` give it to rounding, even if the answers fix some directions
    a million times better than the prior does, and others not at all.
    """
    # R of the QR decomposition has the same singular values and rows. Without it, the SVD would make an [N, N] matrix.
    triangle = np.linalg.qr(np.sqrt(information)[:, None] * design, mode="r")
    _, singular, rows = np.linalg.svd(triangle, full_matrices=True)
    variances = np.ones(rows.shape[0])
    variances[: len(singular)] = 1 / (1 + singular**2)
    inverse: Floats = (rows.T * variances) @ rows
    return inverse


def forgetting(num_answers: int, rate: float) -> Floats:
    """Return [N]: how much each answer counts for a user whose taste changes: `(1 - rate)^age`.

    The newest answer has age 0 and counts 1. A rate of 0 forgets nothing.

    Args:
        num_answers: N.
        rate: in [0, 1).
    """
    if not 0 <= rate < 1:
        raise ValueError(f"rate is {rate}, but must be at least 0 and less than 1")
    return np.asarray((1.0 - rate) ** np.arange(num_answers - 1, -1, -1), dtype=np.float64)


def sigmoid(margins: npt.ArrayLike) -> Floats:
    """Return `1 / (1 + exp(-x))` in float64. Large margins do not overflow."""
    x = np.asarray(margins, dtype=np.float64)
    half = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0, half) / (1.0 + half)


def log_likelihood(margins: Floats, labels: Floats, noise: float) -> Floats:
    """Return the log likelihood of each answer, given its margin. See `estimate_weights`."""
    if noise == 0:
        # log sigmoid(x) = -log(1 + exp(-x)), computed without overflow
        result: Floats = -labels * np.logaddexp(0, -margins) - (1 - labels) * np.logaddexp(0, margins)
        return result
    p = noise + (1 - 2 * noise) * sigmoid(margins)
    noisy: Floats = labels * np.log(p) + (1 - labels) * np.log1p(-p)
    return noisy


def _derivatives(margins: Floats, labels: Floats, noise: float) -> tuple[Floats, Floats]:
    """Return the derivative of the log likelihood by each margin, and the Fisher information of each margin.

    With noise, the log likelihood is not concave. The Fisher information is positive everywhere. Without noise, both
    are equal.
    """
    s = sigmoid(margins)
    ds = s * sigmoid(-margins)
    if noise == 0:
        return labels - s, ds
    p = noise + (1 - 2 * noise) * s
    dp = (1 - 2 * noise) * ds
    variance = p * (1 - p)
    return (labels - p) * dp / variance, dp**2 / variance


def check_answers(differences: Floats, labels: Floats, counts: Floats, offsets: Floats, noise: float) -> None:
    """Raise ValueError if the shapes of answers do not fit, or a value is out of range. See `estimate_weights`."""
    if labels.ndim != 1 or len(labels) != len(differences) or counts.shape != labels.shape:
        raise ValueError(f"{len(differences)} differences, labels {labels.shape} and counts {counts.shape} do not fit")
    if offsets.shape != labels.shape:
        raise ValueError(f"labels {labels.shape} and offsets {offsets.shape} do not fit")
    if not (np.isfinite(differences).all() and np.isfinite(offsets).all()):
        raise ValueError("a difference or an offset is not finite")
    if not ((labels >= 0) & (labels <= 1)).all():
        raise ValueError("a label is not in [0, 1]")
    if not (np.isfinite(counts) & (counts >= 0)).all():
        raise ValueError("a count is negative or not finite")
    if not 0 <= noise < 0.5:
        raise ValueError(f"noise is {noise}, but must be at least 0 and less than 0.5")


def normal_cdf(x: Floats) -> Floats:
    """Return the cumulative distribution function of the standard normal distribution at each of the values, float64.

    It uses the standard library's erf, because numpy has none. A pool has a few thousand questions at most.
    """
    return np.fromiter((0.5 * (1 + erf(value / sqrt(2))) for value in x), dtype=np.float64, count=len(x))
