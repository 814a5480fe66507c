"""Where the joint fit of users and base rewards starts: at a singular value decomposition (SVD) of the labels.

Shapes: U = users, P = different pairs, M = items, F = features of an item, J = base rewards.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from personalized_soups.systems.pref.label_matrix import LabelMatrix
from personalized_soups.systems.preference_models import Comparisons, Floats

# sigmoid(m) is about 1/2 + m/4, so a margin is about four times the centred label
_MARGIN_OF_LABEL = 4.0


class Start(NamedTuple):
    """Where a fit starts. The margin of user u for the pair (a, b) is `users[u] . (x_a - x_b) vectors`.

    Attributes:
        users: [U, J], float64, the weights of each user.
        vectors: [F, J], float64, each base reward as a linear function of an item's features.
    """

    users: Floats
    vectors: Floats


def impute(
    labels_UP: Floats, rank: int, *, rounds: int = 10, centred: bool = True, fixed_first: bool = False
) -> tuple[Floats, Floats]:
    """Return the factors [U, J] and [P, J] of a matrix of labels with missing entries.

    Missing entries start at 0.5. Then, `rounds` times, they take the values of the best approximation of rank J, cut to
    [0, 1] (PReF's reference code, which imputes at rank 100). The factors are `U sqrt(S)` and `V sqrt(S)` of the SVD of
    the completed matrix, so the squared columns of both sum to the same number.

    Args:
        labels_UP: labels in [0, 1], NaN where they are missing.
        rank: J. If the matrix has fewer rows or columns, the last columns of the factors are 0.
        rounds: how often missing entries are replaced.
        centred: subtract 0.5 from the labels before the SVD. Without it, the first factor is spent on the constant 0.5.
        fixed_first: the first factor of each user is 1: all users share the first base reward, which is the mean label.
    """
    middle = 0.5 if centred else 0.0
    missing = np.isnan(labels_UP)
    filled = np.where(missing, 0.5, labels_UP) - middle
    for _ in range(rounds):
        left, right = _factors(filled, rank, fixed_first=fixed_first)
        filled = np.where(missing, np.clip(left @ right.T, -middle, 1 - middle), filled)
    return _factors(filled, rank, fixed_first=fixed_first)


def svd_start(
    comparisons: Comparisons, rank: int, *, rounds: int = 10, centred: bool = True, fixed_first: bool = False
) -> Start:
    """Return the start for comparisons of which many users share each pair: the SVD of the users-by-pairs matrix.

    The base rewards are fitted to the SVD's factors of the pairs by least squares (the solution of smallest norm).
    """
    matrix = LabelMatrix.of(comparisons)
    users, targets = impute(matrix.labels, rank, rounds=rounds, centred=centred, fixed_first=fixed_first)
    differences = comparisons.features[matrix.a] - comparisons.features[matrix.b]
    if fixed_first:  # a user's first weight must stay 1
        scale = np.full(rank, np.sqrt(_MARGIN_OF_LABEL))
        scale[0] = 1.0
        targets = targets * (_MARGIN_OF_LABEL / scale)
        users = users * scale
    else:
        users, targets = users * np.sqrt(_MARGIN_OF_LABEL), targets * np.sqrt(_MARGIN_OF_LABEL)
    vectors = np.linalg.lstsq(differences, targets, rcond=None)[0]
    return Start(users, vectors)


def regression_start(comparisons: Comparisons, rank: int, *, fixed_first: bool = False) -> Start:
    """Return the start for users who compared different pairs: the SVD of all users' ridge regressions.

    Each user's centred labels are regressed on the differences of features. The ridge is the one of the prior under
    which margins have the variance 4, if the features have the variance 1.
    """
    num_features = comparisons.features.shape[1]
    differences = comparisons.differences
    regressions = np.zeros((comparisons.num_users, num_features))
    for user in range(comparisons.num_users):
        mine = comparisons.users == user
        x_NF, y_N = differences[mine], _MARGIN_OF_LABEL * (comparisons.labels[mine] - 0.5)
        gram = x_NF @ x_NF.T
        regressions[user] = x_NF.T @ np.linalg.solve(gram + num_features * np.eye(len(gram)), y_N)
    return Start(*_factors(regressions, rank, fixed_first=fixed_first))


def random_start(comparisons: Comparisons, rank: int, rng: np.random.Generator, *, fixed_first: bool = False) -> Start:
    """Return normal random numbers, with which margins have about the variance 1. It is slow; see `svd_start`."""
    num_features = comparisons.features.shape[1]
    users = rng.standard_normal((comparisons.num_users, rank))
    if fixed_first:
        users[:, 0] = 1.0
    return Start(users, rng.standard_normal((num_features, rank)) / np.sqrt(num_features * rank))


def _factors(matrix: Floats, rank: int, *, fixed_first: bool) -> tuple[Floats, Floats]:
    """Return [rows, J] and [columns, J], whose product is the best approximation of the matrix with J factors."""
    if fixed_first:
        mean = matrix.mean(axis=0)
        rows, columns = _factors(matrix - mean, rank - 1, fixed_first=False)
        ones = np.ones((len(matrix), 1))
        return np.concatenate([ones, rows], axis=1), np.concatenate([mean[:, None], columns], axis=1)
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = min(rank, len(values))
    root = np.sqrt(values[:kept])
    rows, columns = np.zeros((matrix.shape[0], rank)), np.zeros((matrix.shape[1], rank))
    rows[:, :kept], columns[:, :kept] = left[:, :kept] * root, right[:kept].T * root
    return rows, columns
