"""Learn base rewards from the comparisons of many users.

Shapes: U = users, F = features of an item, J = base rewards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import torch

from personalized_soups.errors import UsageError
from personalized_soups.systems.pref.likelihood import JointLikelihood
from personalized_soups.systems.pref.model import PrefModel
from personalized_soups.systems.pref.start import Start, random_start, regression_start, svd_start
from personalized_soups.systems.preference_models import Comparisons, Floats
from personalized_soups.users.answers.prior import GaussianPrior

StartKind: TypeAlias = Literal["auto", "labels", "regressions", "random"]

# With fewer users on a pair, the users-by-pairs matrix says little about which users agree.
_SHARED_FROM = 2.0


@dataclass(frozen=True, slots=True)
class PrefSettings:
    """How PReF learns.

    Attributes:
        rank: J, the number of base rewards.
        users_penalty: the L2 penalty of the users' weights.
        vectors_penalty: the L2 penalty of the base rewards. Features are scaled to differences of variance 1 for it.
        fixed_first: all users share the first base reward: their weight of it is 1.
        start: where the fit starts. `labels` is the SVD of the users-by-pairs matrix, `regressions` the SVD of one
            regression per user, for users who compared different pairs. `auto` chooses `labels` if at least two users
            compared a pair, on average.
        max_steps: the largest number of steps of L-BFGS.
        seed: the random seed of the start `random`.
    """

    rank: int = 5
    users_penalty: float = 1.0
    vectors_penalty: float = 1.0
    fixed_first: bool = False
    start: StartKind = "auto"
    max_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, but must be at least 1")
        if self.fixed_first and self.rank < 2:
            raise ValueError("with fixed_first, rank must be at least 2: the first base reward is the same for all")
        if min(self.users_penalty, self.vectors_penalty) < 0:
            raise ValueError("a penalty is negative")


def train_pref(
    comparisons: Comparisons, settings: PrefSettings | None = None, *, device: torch.device | str = "cpu"
) -> PrefModel:
    """Learn base rewards, and the weights of the users 0 to U-1, from their comparisons.

    The base rewards are then rotated, which changes no prediction: the first has the largest share of the users'
    rewards. The prior is the normal distribution of the users' weights.

    Args:
        comparisons: the comparisons of at least two users.
        settings: the settings. The default is `PrefSettings()`.
        device: where the fit is computed, in float64.

    Raises:
        UsageError: if there are fewer than two users, or all users have the same taste.

    Example:
        >>> items, tastes = np.eye(3), np.array([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
        >>> a, b, users = np.array([0, 1, 0, 0, 1, 0]), np.array([1, 2, 2, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 1])
        >>> labels = tastes[users, a] > tastes[users, b]
        >>> model = train_pref(Comparisons(items, a, b, labels, users), PrefSettings(rank=1))
        >>> np.argmax(model.known_user(1).rewards(items))
        np.int64(2)
    """
    settings = settings or PrefSettings()
    if comparisons.num_users < 2:
        raise UsageError(
            f"base rewards are learned from several users, but there are {comparisons.num_users}",
            where="comparisons",
            mend="give the comparisons of at least 2 users; about 50 users give a usable basis",
        )
    scale = comparisons.scale
    scaled = Comparisons(
        comparisons.features / scale, comparisons.a, comparisons.b, comparisons.labels, comparisons.users
    )
    likelihood = JointLikelihood.of(
        scaled,
        users_penalty=settings.users_penalty,
        vectors_penalty=settings.vectors_penalty,
        fixed_first=settings.fixed_first,
        device=device,
    )
    fitted, losses = likelihood.maximise(start_of(scaled, settings), max_steps=settings.max_steps)
    users, vectors = fitted if settings.fixed_first else rotated(fitted)
    return PrefModel(vectors / scale, users, _prior(users, fixed_first=settings.fixed_first), tuple(losses))


def start_of(comparisons: Comparisons, settings: PrefSettings) -> Start:
    """Return the start that the settings choose."""
    rank, fixed_first = settings.rank, settings.fixed_first
    if settings.start == "random":
        return random_start(comparisons, rank, np.random.default_rng(settings.seed), fixed_first=fixed_first)
    num_pairs = len(np.unique(np.sort(np.stack([comparisons.a, comparisons.b]), axis=0), axis=1).T)
    is_shared = len(comparisons) >= _SHARED_FROM * num_pairs
    if settings.start == "labels" or (settings.start == "auto" and is_shared):
        return svd_start(comparisons, rank, fixed_first=fixed_first)
    return regression_start(comparisons, rank, fixed_first=fixed_first)


def rotated(fitted: Start) -> Start:
    """Return the same margins with orthogonal columns of equal norm in users and vectors, the largest first.

    The product `users vectors'` is kept. The largest entry of each column of the vectors is positive, so the result
    does not depend on the signs that an SVD happens to choose.
    """
    users_q, users_r = np.linalg.qr(fitted.users)
    vectors_q, vectors_r = np.linalg.qr(fitted.vectors)
    left, values, right = np.linalg.svd(users_r @ vectors_r.T)
    kept = min(len(values), fitted.users.shape[1])
    users = _padded(users_q @ left[:, :kept] * np.sqrt(values[:kept]), fitted.users.shape[1])
    vectors = _padded(vectors_q @ right[:kept].T * np.sqrt(values[:kept]), fitted.users.shape[1])
    largest = vectors[np.argmax(np.abs(vectors), axis=0), np.arange(vectors.shape[1])]
    signs = np.where(largest < 0, -1.0, 1.0)
    return Start(users * signs, vectors * signs)


def _padded(matrix: Floats, columns: int) -> Floats:
    return np.pad(matrix, ((0, 0), (0, columns - matrix.shape[1])))


def _prior(users_UJ: Floats, *, fixed_first: bool) -> GaussianPrior:
    if not fixed_first:
        return GaussianPrior.fit(users_UJ)
    # the first weight is known: it keeps the variance at which it moves by a thousandth of the others at most
    rest = GaussianPrior.fit(users_UJ[:, 1:])
    covariance = np.zeros((users_UJ.shape[1],) * 2)
    covariance[1:, 1:] = rest.covariance
    covariance[0, 0] = 1e-6 * float(np.linalg.eigvalsh(rest.covariance)[0])
    return GaussianPrior(np.concatenate([[1.0], rest.mean]), covariance)
