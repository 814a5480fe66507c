"""The interface of systems that learn from many users' comparisons, and then adapt to a new user.

Shapes: N = comparisons, F = features of an item, M = items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Comparisons:
    """Pairs of items that users compared.

    Attributes:
        a: [N, F], float64, the frozen features of the first item of each pair.
        b: [N, F], float64, the features of the second item.
        labels: [N], float64, the probability that the user prefers `a`: 1, 0, or 0.5 for a tie.
        users: [N], int64, the number of the user who compared the pair, from 0.
    """

    a: Floats
    b: Floats
    labels: Floats
    users: npt.NDArray[np.int64]


class UserReward(Protocol):
    """The reward function of one user."""

    def rewards(self, features_MF: Floats, /) -> Floats:
        """Return [M], float64: the reward of each item. Only differences of rewards have a meaning."""
        ...


class PreferenceModel(Protocol):
    """A system that has learned from known users."""

    def known_user(self, user: int, /) -> UserReward:
        """Return the reward of a user of the training data."""
        ...

    def new_user(self, comparisons: Comparisons, /) -> UserReward:
        """Return the reward of a new user, given the user's own comparisons (`users` is ignored). There may be none."""
        ...
