"""`PrefModel`: base rewards and the weights of known users.

Shapes: U = users, F = features of an item, J = base rewards, N = comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

from personalized_soups.systems.preference_models import Comparisons, Floats, LinearReward
from personalized_soups.users.answers.estimate import Estimate, estimate_weights
from personalized_soups.users.answers.prior import GaussianPrior


@dataclass(frozen=True, slots=True, eq=False)
class PrefModel:
    """Base rewards that are linear in an item's features, with the weights of known users.

    Attributes:
        vectors: [F, J], float64: the base rewards of an item with the features x are `x vectors`.
        users: [U, J], float64, the weights of the known users.
        prior: what is assumed of a new user's weights.
        losses: the penalised negative log likelihood during the training, first at the start.
    """

    vectors: Floats
    users: Floats
    prior: GaussianPrior
    losses: tuple[float, ...] = ()

    def known_user(self, user: int) -> LinearReward:
        """Return the reward of a user of the training data."""
        return LinearReward(self.vectors @ self.users[user])

    def new_user(self, comparisons: Comparisons) -> LinearReward:
        """Return the reward of a new user: the most likely one after the user's comparisons, given the prior."""
        return LinearReward(self.vectors @ self.estimate(comparisons).mean)

    def estimate(self, comparisons: Comparisons) -> Estimate:
        """Return the estimate of a new user's weights after the user's comparisons."""
        return estimate_weights(comparisons.differences @ self.vectors, comparisons.labels, self.prior)
