"""One reward that all users share.

Shapes: N = comparisons, F = features of an item.
"""

from __future__ import annotations

from dataclasses import dataclass

from personalized_soups.systems.preference_models import Comparisons, Floats, LinearReward
from personalized_soups.users.answers.estimate import estimate_weights
from personalized_soups.users.answers.prior import GaussianPrior


@dataclass(frozen=True, slots=True, eq=False)
class BradleyTerryModel:
    """One reward, linear in an item's features. It knows no users, so a user's comparisons change nothing.

    Attributes:
        weights: [F], float64.
    """

    weights: Floats

    def known_user(self, user: int) -> LinearReward:
        """Return the shared reward."""
        return LinearReward(self.weights)

    def new_user(self, comparisons: Comparisons) -> LinearReward:
        """Return the shared reward."""
        return LinearReward(self.weights)


def train_bradley_terry(comparisons: Comparisons, *, penalty: float = 1.0) -> BradleyTerryModel:
    """Return the reward w that is most likely after all users' comparisons.

    It maximises `sum log sigmoid(w . (x_a - x_b)) - penalty / 2 |w|^2` by Newton's method, with features that are
    scaled to differences of variance 1. Each step takes a time of order F^3.

    Args:
        comparisons: the comparisons of all users.
        penalty: greater than 0.
    """
    scale = comparisons.scale
    prior = GaussianPrior.ridge(comparisons.features.shape[1], penalty=penalty)
    estimate = estimate_weights(comparisons.differences / scale, comparisons.labels, prior)
    return BradleyTerryModel(estimate.mean / scale)
