"""`GaussianPrior`: what is assumed of a user's reward weights before the first answer.

Shapes: U = known users, D = base rewards.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from personalized_soups.errors import UsageError

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class GaussianPrior:
    """A normal distribution of reward weights.

    Attributes:
        mean: [D], float64.
        covariance: [D, D], float64, symmetric and positive definite.

    Example:
        >>> GaussianPrior.ridge(2, penalty=4.0).covariance.tolist()
        [[0.25, 0.0], [0.0, 0.25]]
    """

    mean: Floats
    covariance: Floats

    def __post_init__(self) -> None:
        num = self.mean.shape[0] if self.mean.ndim == 1 else -1
        if self.covariance.shape != (num, num):
            raise ValueError(f"mean has shape {self.mean.shape}, but covariance has shape {self.covariance.shape}")
        if not (np.isfinite(self.mean).all() and np.isfinite(self.covariance).all()):
            raise ValueError("mean and covariance must be finite")
        if num and np.linalg.eigvalsh(self.covariance)[0] <= 0:
            raise ValueError("covariance must be positive definite")

    @classmethod
    def ridge(cls, num_rewards: int, *, penalty: float = 1.0) -> GaussianPrior:
        """Return the prior N(0, 1 / penalty), whose log density is an L2 penalty: `-(penalty / 2) |w|^2`.

        Args:
            num_rewards: D, the number of base rewards.
            penalty: greater than 0.
        """
        if penalty <= 0:
            raise ValueError(f"penalty is {penalty}, but must be greater than 0")
        return cls(np.zeros(num_rewards), np.eye(num_rewards) / penalty)

    @classmethod
    def fit(cls, weights_UD: npt.ArrayLike) -> GaussianPrior:
        """Return the normal distribution with the mean and the shrunk covariance of known users' weights.

        The covariance is shrunk towards a multiple of the identity by the rule of Ledoit and Wolf (2004, "A
        well-conditioned estimator for large-dimensional covariance matrices"), so few users give a usable prior.

        Args:
            weights_UD: the reward weights of at least two users.

        Raises:
            UsageError: if there are fewer than two users, or all users have the same weights.
        """
        weights = np.asarray(weights_UD, dtype=np.float64)
        if weights.ndim != 2 or len(weights) < 2:
            raise UsageError(
                f"a prior needs the weights of at least 2 users, but the weights have shape {weights.shape}",
                where="weights",
                mend="give the weights of more users, or use GaussianPrior.ridge",
            )
        mean = weights.mean(axis=0)
        centred = weights - mean
        sample = centred.T @ centred / len(weights)
        num_rewards = sample.shape[0]
        variance = np.trace(sample) / num_rewards
        if variance == 0:
            raise UsageError(
                "all users have the same weights, so their covariance is 0",
                where="weights",
                mend="give users with different weights, or use GaussianPrior.ridge",
            )
        target = variance * np.eye(num_rewards)
        distance = float(np.sum((sample - target) ** 2))
        # the mean squared distance between one user's outer product and the sample covariance
        noise = float(np.mean(np.sum(centred**2, axis=1) ** 2) - np.sum(sample**2)) / len(weights)
        share = 1.0 if distance == 0 else min(1.0, max(noise / distance, 1e-6))
        return cls(mean, (1 - share) * sample + share * target)

    def restricted(self, keep: npt.ArrayLike) -> GaussianPrior:
        """Return the prior of some of the weights: the marginal distribution at the indices `keep`."""
        index = np.asarray(keep, dtype=np.intp)
        return GaussianPrior(self.mean[index], self.covariance[np.ix_(index, index)])
