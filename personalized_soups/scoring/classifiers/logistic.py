"""Fit a logistic regression with an L2 penalty by Newton's method with conjugate gradients.

Shapes: N = texts, F = features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from personalized_soups.scoring.classifiers.rows import Floats, Rows

# The fit ends when no derivative is larger. Weights of the texts sum to 1, so the loss is at most about 1.
_TOLERANCE = 1e-9
_MAX_STEPS = 100
_MAX_HALVINGS = 50


@dataclass(frozen=True, eq=False, slots=True)
class LogisticModel:
    """A linear function of the features: the log-odds of the high class.

    Attributes:
        weights: [F], float64.
        intercept: the log-odds of a text whose features are all 0.
    """

    weights: Floats
    intercept: float

    def log_odds(self, rows: Rows) -> Floats:
        """Return [N], float64: the log-odds of the high class for each row."""
        return rows.dot(self.weights) + self.intercept


def fit_logistic(rows: Rows, is_high: Floats, importance: Floats, penalty: float) -> LogisticModel:
    """Return the model that minimises `sum_n s_n log(1 + exp(-y_n f_n)) + penalty / 2 |w|^2`.

    `f` is the log-odds, `y` is 1 for the high class and -1 for the low class, and `s` is the importance divided by its
    sum. The intercept has no penalty. The loss is strictly convex in the weights, so the result is unique.

    Args:
        rows: the features.
        is_high: [N], 1 for a text of the high class and 0 for one of the low class.
        importance: [N], at least 0. Texts of importance 0 do not count.
        penalty: greater than 0.

    Raises:
        ValueError: if the penalty is not greater than 0, or one of the classes has no importance.
    """
    if not penalty > 0:
        raise ValueError(f"penalty must be greater than 0, got {penalty}")
    if min(float(importance @ is_high), float(importance @ (1 - is_high))) <= 0:
        raise ValueError("each class needs a text whose importance is greater than 0")
    share = importance / importance.sum()
    point = np.zeros(rows.shape[1] + 1)  # the weights, then the intercept
    log_odds = np.zeros(rows.shape[0])
    for _ in range(_MAX_STEPS):
        chance = _sigmoid(log_odds)
        slope_N = share * (chance - is_high)
        gradient = np.append(rows.transposed_dot(slope_N) + penalty * point[:-1], slope_N.sum())
        if np.abs(gradient).max() <= _TOLERANCE:
            break
        step = _newton_step(rows, share * chance * (1 - chance), gradient, penalty)
        along_N = rows.dot(step[:-1]) + step[-1]

        def loss(size: float) -> float:
            moved, weights = log_odds + size * along_N, point[:-1] + size * step[:-1]  # noqa: B023
            # log(1 + exp(f)) - y f, for y = 1 or 0
            return float(share @ (np.logaddexp(0.0, moved) - is_high * moved) + penalty / 2 * (weights @ weights))

        size = _step_size(loss, slope=float(gradient @ step))
        point, log_odds = point + size * step, log_odds + size * along_N
    return LogisticModel(point[:-1], float(point[-1]))


def _newton_step(rows: Rows, curvature_N: Floats, gradient: Floats, penalty: float) -> Floats:
    """Return the step d with `H d = -gradient`, for the Hessian H, by conjugate gradients."""

    def hessian(vector: Floats) -> Floats:
        scaled_N = curvature_N * (rows.dot(vector[:-1]) + vector[-1])
        # the intercept has no penalty; the tiny term keeps H invertible where all chances are nearly 0 or 1
        return np.append(rows.transposed_dot(scaled_N) + penalty * vector[:-1], scaled_N.sum() + 1e-12 * vector[-1])

    step = np.zeros_like(gradient)
    residual = -gradient
    direction = residual.copy()
    size = float(residual @ residual)
    # A looser solution is enough while the gradient is large, and keeps the convergence superlinear.
    enough = size * min(0.25, float(np.sqrt(size))) ** 2
    for _ in range(2 * len(gradient) + 10):
        if size <= enough:
            break
        image = hessian(direction)
        length = size / float(direction @ image)
        step += length * direction
        residual -= length * image
        old, size = size, float(residual @ residual)
        direction = residual + size / old * direction
    return step


def _step_size(loss: Callable[[float], float], *, slope: float) -> float:
    """Return the first of 1, 1/2, 1/4, ... at which the loss falls enough (Armijo's condition)."""
    size, start = 1.0, loss(0.0)
    for _ in range(_MAX_HALVINGS):
        # Near the minimum the loss changes less than it is rounded, so an equal loss is accepted.
        if loss(size) <= start + 1e-4 * size * slope + 1e-15:
            break
        size /= 2
    return size


def _sigmoid(log_odds: Floats) -> Floats:
    # exp of a number that is at most 0 cannot overflow
    small = np.exp(-np.abs(log_odds))
    chance: Floats = np.where(log_odds >= 0, 1.0, small) / (1.0 + small)
    return chance
