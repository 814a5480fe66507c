"""Check intervals: does a 90% interval hold the true weight 90% of the time?

The users answer by the model that the estimate assumes: their weights are drawn from the prior, and their answers are
logistic with the temperature 1. Users without noise do not fix the scale of their weights, so they are no test of the
intervals. Opposite sides have nearly opposite rewards, so the weights of a dimension are compared as their difference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from personalized_soups.declare.side_rule import SideRule
from personalized_soups.studies.elicitation.systems import COUNTS, ask
from personalized_soups.studies.elicitation.world import Floats
from personalized_soups.tiny.simulated_users import logistic_labels
from personalized_soups.users.answers.pool import QuestionPool
from personalized_soups.users.answers.preferences import experts_by_dimension
from personalized_soups.users.answers.selection import Rule
from personalized_soups.users.answers.stopping import expected_agreement

LEVEL = 0.9


class Calibration(TypedDict):
    """The figures by the number of answers.

    Attributes:
        inside: the share of 90% intervals, over users and dimensions, that hold the true difference.
        width: the mean width of the intervals, as a share of their width before the first answer.
        expected: the mean agreement that sessions expect on the questions that were not asked, by which they stop.
        agreement: the share of these questions whose preferred answer is predicted.
        error: the root mean square error of the differences, as a share of the differences' own root mean square.
    """

    inside: dict[str, float]
    width: dict[str, float]
    expected: dict[str, float]
    agreement: dict[str, float]
    error: dict[str, float]


def directions(experts: Sequence[str], rule: SideRule) -> Floats:
    """Return [K, D]: for each dimension with two sides, 1 at the first side and -1 at the second side."""
    rows = []
    for members in experts_by_dimension(experts, rule).values():
        row = np.zeros(len(experts))
        row[members[0]] = 1.0
        if len(members) > 1:
            row[members[1]] = -1.0
        rows.append(row)
    return np.stack(rows)


def calibrate(pool: QuestionPool, sides: SideRule, *, rule: Rule, num_users: int, seed: int) -> Calibration:
    """Return the figures for users whose weights are drawn from the pool's prior."""
    rng = np.random.default_rng([seed, 1])
    weights_UD = rng.multivariate_normal(pool.prior.mean, pool.prior.covariance, size=num_users, method="cholesky")
    axes = directions(pool.names, sides)
    inside = {count: [] for count in COUNTS}  # type: dict[int, list[bool]]
    width = {count: [] for count in COUNTS}  # type: dict[int, list[float]]
    error = {count: [] for count in COUNTS}  # type: dict[int, list[float]]
    expected = {count: [] for count in COUNTS}  # type: dict[int, list[float]]
    agreed = {count: [] for count in COUNTS}  # type: dict[int, list[float]]
    before = [float(np.sqrt(axis @ pool.prior.covariance @ axis)) for axis in axes]
    differences = pool.differences
    for weights in weights_UD:
        labels = logistic_labels(weights[None], differences, rng)[0]
        asked, _, estimates = ask(
            lambda index, _, labels=labels: float(labels[index]),  # type: ignore[misc] # bound at once
            differences,
            pool.prior,
            pool.prompts,
            rule=rule,
            rng=rng,
        )
        for count, estimate in estimates.items():
            others = np.delete(differences, asked[:count], axis=0)
            expected[count].append(expected_agreement(estimate, others))
            agreed[count].append(float(np.mean((others @ estimate.mean > 0) == (others @ weights > 0))))
            for axis, prior_deviation in zip(axes, before, strict=True):
                low, high = estimate.interval(axis, level=LEVEL)
                inside[count].append(low <= axis @ weights <= high)
                deviation = float(np.sqrt(axis @ estimate.covariance @ axis))
                width[count].append(deviation / prior_deviation)
                error[count].append(float((axis @ (estimate.mean - weights)) ** 2))
    size = float(np.sqrt(np.mean((weights_UD @ axes.T) ** 2)))
    return {
        "inside": {str(count): float(np.mean(inside[count])) for count in COUNTS},
        "width": {str(count): float(np.mean(width[count])) for count in COUNTS},
        "expected": {str(count): float(np.mean(expected[count])) for count in COUNTS},
        "agreement": {str(count): float(np.mean(agreed[count])) for count in COUNTS},
        "error": {str(count): float(np.sqrt(np.mean(error[count]))) / size for count in COUNTS},
    }
