"""The interface of systems that learn from many users' comparisons, and then adapt to a new user.

Shapes: N = comparisons, F = features of an item, M = items.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Comparisons:
    """Pairs of items that users compared. Items are rows of one table, so many comparisons share their features.

    Attributes:
        features: [M, F], float64, the frozen features of every item.
        a: [N], int64, the index of the first item of each pair.
        b: [N], int64, the index of the second item.
        labels: [N], float64, the probability that the user prefers `a`: 1, 0, or 0.5 for a tie.
        users: [N], int64, the number of the user who compared the pair, from 0.

    Raises:
        ValueError: if shapes do not fit, an index is out of range, a feature is not finite, or a label is not in
            [0, 1].

    Example:
        >>> comparisons = Comparisons(np.eye(3), np.array([0, 2]), np.array([1, 0]), np.array([1.0, 0.5]))
        >>> comparisons.differences.tolist()
        [[1.0, -1.0, 0.0], [-1.0, 0.0, 1.0]]
    """

    features: Floats
    a: Indices
    b: Indices
    labels: Floats
    users: Indices

    def __init__(
        self,
        features: npt.ArrayLike,
        a: npt.ArrayLike,
        b: npt.ArrayLike,
        labels: npt.ArrayLike,
        users: npt.ArrayLike | None = None,
    ) -> None:
        for name, value in (("features", features), ("labels", labels)):
            object.__setattr__(self, name, np.asarray(value, dtype=np.float64))
        for name, indices in (("a", a), ("b", b), ("users", np.zeros(len(self.labels)) if users is None else users)):
            object.__setattr__(self, name, np.asarray(indices, dtype=np.int64))
        self._check()

    @classmethod
    def of_pairs(
        cls, a_NF: npt.ArrayLike, b_NF: npt.ArrayLike, labels: npt.ArrayLike, users: npt.ArrayLike | None = None
    ) -> Comparisons:
        """Return comparisons of which each has its own two items, given by their features."""
        first, second = np.asarray(a_NF, dtype=np.float64), np.asarray(b_NF, dtype=np.float64)
        if first.shape != second.shape or first.ndim != 2:
            raise ValueError(f"a has shape {first.shape} and b has shape {second.shape}, but both must be [N, F]")
        count = len(first)
        return cls(np.concatenate([first, second]), np.arange(count), np.arange(count, 2 * count), labels, users)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_users(self) -> int:
        """One more than the largest number of a user. 0 without comparisons."""
        return int(self.users.max()) + 1 if len(self) else 0

    @property
    def differences(self) -> Floats:
        """[N, F]: the features of `a` minus the features of `b`."""
        result: Floats = self.features[self.a] - self.features[self.b]
        return result

    @property
    def scale(self) -> float:
        """The root mean square of the differences of features. It is 1 if all differences are 0."""
        mean_square = float(np.mean(self.differences**2)) if len(self) else 0.0
        return float(np.sqrt(mean_square)) if mean_square > 0 else 1.0

    def at(self, index: npt.ArrayLike) -> Comparisons:
        """Return some of the comparisons: `index` is a mask [N] or an array of indices."""
        chosen = np.asarray(index)
        if chosen.size == 0:
            chosen = chosen.astype(np.int64)
        return Comparisons(self.features, self.a[chosen], self.b[chosen], self.labels[chosen], users=self.users[chosen])

    def of_user(self, user: int) -> Comparisons:
        """Return the comparisons of one user."""
        return self.at(self.users == user)

    def _check(self) -> None:
        shapes = {name: getattr(self, name).shape for name in ("a", "b", "labels", "users")}
        if self.features.ndim != 2 or self.labels.ndim != 1 or len(set(shapes.values())) > 1:
            raise ValueError(f"features {self.features.shape} and {shapes} do not fit")
        if not np.isfinite(self.features).all():
            raise ValueError("a feature is not finite")
        if not len(self):
            return
        items = np.concatenate([self.a, self.b])
        if items.min() < 0 or items.max() >= len(self.features):
            raise ValueError(f"an item's index is not in [0, {len(self.features)})")
        if self.users.min() < 0:
            raise ValueError("the number of a user is negative")
        if not ((self.labels >= 0) & (self.labels <= 1)).all():
            raise ValueError("a label is not in [0, 1]")


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


@dataclass(frozen=True, slots=True, eq=False)
class LinearReward:
    """A reward that is linear in the features of an item.

    Attributes:
        weights: [F], float64.
    """

    weights: Floats

    def rewards(self, features_MF: Floats) -> Floats:
        """Return [M], float64: the reward of each item."""
        result: Floats = np.asarray(features_MF, dtype=np.float64) @ self.weights
        return result
