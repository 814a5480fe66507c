"""The mixtures of rewards on which backbones are trained, and the weights with which backbones are merged.

With n rewards, backbone i is trained on the mixture `h_i = sum_j K_ij r_j`. K is circulant: beta on the diagonal, and
(1 - beta) / (n - 1) elsewhere. A user's preference is a vector mu, and the user's reward is `sum_j mu_j r_j`. The merge
weights solve `K^T lambda = mu`, so that the mixtures of the backbones, weighted by lambda, add up to the user's reward.
With beta = 1, a backbone has one reward, and the weights are the preference: Rewarded Soups.

Shapes: N = rewards and backbones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from personalized_soups.errors import UsageError

Floats = npt.NDArray[np.float64]

# The values of beta that the paper tries on validation.
BETAS = (0.6, 0.7, 0.8)


def mixing_matrix(num_rewards: int, beta: float) -> Floats:
    """Return K [N, N], float64.

    Raises:
        UsageError: if `beta` is not in (1/N, 1], or there are no rewards. With 1/N, all backbones would be equal.

    Example:
        >>> mixing_matrix(3, 0.6)[0].tolist()
        [0.6, 0.2, 0.2]
    """
    if num_rewards < 1:
        raise UsageError("there are no rewards", where="num_rewards", mend="give at least one reward")
    if not 1 / num_rewards < beta <= 1 and not (num_rewards == 1 and beta == 1):
        raise UsageError(
            f"beta is {beta:g}, but must be above 1/{num_rewards} and at most 1",
            where="beta",
            mend=f"give one of {', '.join(map(str, BETAS))}",
        )
    other = (1 - beta) / (num_rewards - 1) if num_rewards > 1 else 0.0
    return np.full((num_rewards, num_rewards), other) + (beta - other) * np.eye(num_rewards)


def backbone_rewards(rewards: Sequence[str], beta: float) -> dict[str, dict[str, float]]:
    """Return the weight of each reward for each backbone. A backbone has the name of its main reward.

    The inner mappings are `rewards` of `train_policy`.

    Raises:
        UsageError: if `beta` is out of range, or a reward is repeated.

    Example:
        >>> backbone_rewards(["expert", "informative", "friendly"], 0.8)["friendly"]
        {'expert': 0.1, 'informative': 0.1, 'friendly': 0.8}
    """
    if len(set(rewards)) != len(rewards):
        raise UsageError("a reward is repeated", where="rewards", mend="name each reward once")
    matrix_NN = mixing_matrix(len(rewards), beta)
    return {
        name: {other: round(float(weight), 12) for other, weight in zip(rewards, row_N, strict=True)}
        for name, row_N in zip(rewards, matrix_NN, strict=True)
    }


def backbone_weights(preference: Mapping[str, float], beta: float) -> dict[str, float]:
    """Return the weight of each backbone in the merge for a preference. A weight may be negative, or above 1.

    Args:
        preference: the user's weight of each reward. A user who prefers the low side of a dimension has a negative
            weight for the reward of its high side.
        beta: the beta with which the backbones were trained.

    Raises:
        UsageError: if `beta` is out of range.

    Example:
        >>> weights = backbone_weights({"expert": 1.0, "informative": 0.0, "friendly": 0.0}, 0.6)
        >>> [round(weight, 3) for weight in weights.values()]
        [2.0, -0.5, -0.5]
    """
    matrix_NN = mixing_matrix(len(preference), beta)
    weights_N = np.linalg.solve(matrix_NN.T, np.asarray(list(preference.values()), dtype=np.float64))
    return dict(zip(preference, weights_N.tolist(), strict=True))
