"""`LoreModel`: base rewards, and known users' convex combinations of them.

Shapes: U = users, F = features of an item, J = base rewards, N = comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from personalized_soups.systems.preference_models import Comparisons, Floats, LinearReward
from personalized_soups.users.answers.prior import GaussianPrior

# of a new user's fit, in the reference code
_NEW_USER_STEPS = 500
_NEW_USER_RATE = 0.1

# An unused weight counts as this much where a logarithm is taken.
_LEAST_WEIGHT = 1e-6


@dataclass(frozen=True, slots=True, eq=False)
class LoreModel:
    """Base rewards that are linear in an item's features, with a convex combination for each known user.

    Attributes:
        vectors: [F, J], float64: the base rewards of an item with the features x are `x vectors`.
        users: [U, J], float64, the weights of the known users. Each row is at least 0 and sums to 1.
        losses: the loss before each step of the training.
    """

    vectors: Floats
    users: Floats
    losses: tuple[float, ...] = ()

    @property
    def prior(self) -> GaussianPrior:
        """The normal distribution of the known users' weights, for rules that need one. LoRe itself has no prior."""
        if np.ptp(self.users, axis=0).max() == 0:
            num_rewards = self.users.shape[1]
            return GaussianPrior(self.users.mean(axis=0), _LEAST_WEIGHT * np.eye(num_rewards))
        return GaussianPrior.fit(self.users)

    def known_user(self, user: int) -> LinearReward:
        """Return the reward of a user of the training data."""
        return LinearReward(self.vectors @ self.users[user])

    def new_user(self, comparisons: Comparisons) -> LinearReward:
        """Return the reward of a new user. Only the user's weights are fitted; see `weights`."""
        return LinearReward(self.vectors @ self.weights(comparisons))

    def weights(self, comparisons: Comparisons) -> Floats:
        """Return the weights [J] of a new user, at least 0 and with the sum 1.

        As in the reference code, 500 steps of Adam with the rate 0.1 minimise the mean negative log likelihood by the
        logits of the weights. They start at the known users' mean weights, which remain without comparisons. The
        reference code starts at normal random numbers.
        """
        logits = torch.tensor(np.log(np.maximum(self.users.mean(axis=0), _LEAST_WEIGHT)), requires_grad=True)
        if len(comparisons):
            base_NJ = torch.tensor(comparisons.differences @ self.vectors)
            labels = torch.tensor(comparisons.labels)
            optimiser = torch.optim.Adam([logits], lr=_NEW_USER_RATE)
            for _ in range(_NEW_USER_STEPS):
                optimiser.zero_grad()
                margins = base_NJ @ torch.softmax(logits, dim=0)
                torch.nn.functional.binary_cross_entropy_with_logits(margins, labels).backward()
                optimiser.step()
        result: Floats = torch.softmax(logits, dim=0).detach().numpy()
        return result
