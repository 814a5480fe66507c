"""Describe an estimate by dimensions: which side the user prefers, how strongly, and how certain that is.

The experts of opposite sides have nearly opposite rewards, so answers fix only the difference of their weights. This
module therefore compares the sides of each dimension.

Shapes: D = base rewards, with one reward for each expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from personalized_soups.declare.side_rule import SideRule
from personalized_soups.users.answers.estimate import Estimate, normal_cdf
from personalized_soups.users.answers.prior import Floats

Certainty: TypeAlias = Literal["clear", "likely", "open"]

# The preferred side is right with at least these probabilities.
CLEAR = 0.95
LIKELY = 0.8


@dataclass(frozen=True, slots=True)
class Preference:
    """What the answers say of one dimension.

    Attributes:
        dimension: the dimension, or the expert's name if the expert belongs to no dimension.
        preferred: the expert with the greatest weight in the dimension.
        other: the expert that it is compared with: the second greatest weight. None if the dimension has one expert.
        strength: the mean difference of the two weights; the mean weight if there is no other expert.
        interval: the interval that holds the difference with probability `level`.
        level: the probability of the interval.
        probability: the probability that the user prefers `preferred` to `other`, at least 0.5 for two experts. For a
            single expert, a probability near 0 means that the user dislikes it.
        certainty: `clear` if the preferred side is right with a probability of 0.95, `likely` from 0.8, else `open`.
    """

    dimension: str
    preferred: str
    other: str | None
    strength: float
    interval: tuple[float, float]
    level: float
    probability: float
    certainty: Certainty


def preferences_of(
    estimate: Estimate, experts: Sequence[str], rule: SideRule, *, level: float = 0.9
) -> list[Preference]:
    """Return one Preference for each dimension, in the order in which the dimensions first occur in `experts`.

    Args:
        estimate: the estimate of the weights of the experts' rewards.
        experts: the name of each of the D experts.
        rule: knows the dimension of each expert.
        level: the probability of the intervals, in (0, 1).

    Example:
        >>> rule = SideRule({"friendly": "style", "unfriendly": "style"})
        >>> estimate = estimate_weights([[2.0, -2.0]] * 3, [1.0] * 3, GaussianPrior.ridge(2))
        >>> (style,) = preferences_of(estimate, ["friendly", "unfriendly"], rule)
        >>> style.preferred, style.certainty
        ('friendly', 'likely')
    """
    preferences = []
    for dimension, members in experts_by_dimension(experts, rule).items():
        ranked = sorted(members, key=lambda index: -float(estimate.mean[index]))
        direction = _direction(len(experts), ranked)
        mean = float(direction @ estimate.mean)
        deviation = float(np.sqrt(direction @ estimate.covariance @ direction))
        probability = float(normal_cdf(np.array([mean / deviation]))[0])
        surest = max(probability, 1 - probability)  # a single expert of a dimension may be disliked
        preferences.append(
            Preference(
                dimension=dimension,
                preferred=experts[ranked[0]],
                other=experts[ranked[1]] if len(ranked) > 1 else None,
                strength=mean,
                interval=estimate.interval(direction, level=level),
                level=level,
                probability=probability,
                certainty="clear" if surest >= CLEAR else "likely" if surest >= LIKELY else "open",
            )
        )
    return preferences


def experts_by_dimension(experts: Sequence[str], rule: SideRule) -> dict[str, list[int]]:
    """Return the indices of the experts of each dimension. An expert without a dimension has one of its own name."""
    members: dict[str, list[int]] = {}
    for index, expert in enumerate(experts):
        members.setdefault(rule.dimension_of.get(expert, expert), []).append(index)
    return members


def _direction(num_rewards: int, ranked: Sequence[int]) -> Floats:
    direction = np.zeros(num_rewards)
    direction[ranked[0]] = 1.0
    if len(ranked) > 1:
        direction[ranked[1]] = -1.0
    return direction
