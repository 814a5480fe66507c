"""`RatingBasis`: base rewards of statements, learned from people's ratings.

The model of a rating is `mean + w . phi_i + e_i`: `phi_i` has J learned rewards and one more, the statement's mean
rating. The weight of the mean rating is 1 for an average person, and 0 for someone who does not share the common order.

Shapes: P = people, M = statements, J = learned rewards, D = J + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from blake3 import blake3

from personalized_soups.studies.papi.ratings import Floats
from personalized_soups.users.answers.prior import GaussianPrior

_LEAST_DEVIATION = (
    0.05  # ratings are whole numbers, so no statement is predicted to much less than 1/12, rounding's own
)
_MEAN_PENALTY = 1e-6  # the weight of the mean order is free when known people's weights are estimated


@dataclass(frozen=True, slots=True)
class RatingBasis:
    """Base rewards of statements, as `BaseRewards` of statement numbers.

    Attributes:
        matrix: [M, D], float64.
        deviations: [M], the variance of each statement's own part.
        centre: the mean of all ratings.
        prior: the distribution of the known people's weights.
    """

    matrix: Floats
    deviations: Floats
    centre: float
    prior: GaussianPrior

    @property
    def names(self) -> tuple[str, ...]:
        """`learned-1`, `learned-2`, ..., and `common`."""
        return (*(f"learned-{at + 1}" for at in range(self.matrix.shape[1] - 1)), "common")

    @property
    def digest(self) -> str:
        """The hash of the matrix."""
        return blake3(np.ascontiguousarray(self.matrix).tobytes()).hexdigest()

    def features(self, items: Sequence[int]) -> Floats:
        """Return [N, D]: the base rewards of the statements with the given indices."""
        return self.matrix[np.asarray(items, dtype=np.intp)]

    def weights(self, ratings_M: Floats, *, prior: GaussianPrior | None = None) -> Floats:
        """Return [D]: the most likely weights of a person who has rated statements. Missing ratings are NaN."""
        prior = self.prior if prior is None else prior
        rated = ~np.isnan(ratings_M)
        features = self.matrix[rated]
        weighted = features / self.deviations[rated, None]
        precision = np.linalg.inv(prior.covariance)
        residual = ratings_M[rated] - self.centre - features @ prior.mean
        result: Floats = prior.mean + np.linalg.solve(precision + weighted.T @ features, weighted.T @ residual)
        return result


def learn_basis(ratings_PM: Floats, num_rewards: int) -> RatingBasis:
    """Learn J base rewards from the ratings of known people.

    The ratings are centred by each statement's mean, and missing ratings are set to the mean. The truncated singular
    value decomposition gives the rewards, in units in which the known people's weights have a variance of 1.

    Args:
        ratings_PM: the known people's ratings. A missing rating is NaN.
        num_rewards: J.
    """
    mean = np.nanmean(ratings_PM, axis=0)
    centred = np.where(np.isnan(ratings_PM), 0.0, ratings_PM - mean)
    _, singular, rows = np.linalg.svd(centred, full_matrices=False)
    learned = rows[:num_rewards].T * singular[:num_rewards] / np.sqrt(len(centred))
    deviations = np.maximum(centred.var(axis=0) - np.sum(learned**2, axis=1), _LEAST_DEVIATION)
    matrix = np.concatenate([learned, (mean - mean.mean())[:, None]], axis=1)
    # N(0, 1) for the learned weights, which have a variance of 1 by construction, and a flat prior for the mean order
    first = GaussianPrior(np.zeros(num_rewards + 1), np.diag([*([1.0] * num_rewards), 1 / _MEAN_PENALTY]))
    basis = RatingBasis(matrix, deviations, float(mean.mean()), first)
    weights = np.stack([basis.weights(person) for person in ratings_PM])
    return RatingBasis(matrix, deviations, basis.centre, GaussianPrior.fit(weights))
