"""The users-by-pairs matrix, its imputation, and the starts."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.systems.pref.label_matrix import LabelMatrix
from personalized_soups.systems.pref.start import impute, regression_start, svd_start
from personalized_soups.systems.preference_models import Comparisons


def test_a_pair_in_the_other_order_is_the_same_pair_with_the_other_label() -> None:
    comparisons = Comparisons(np.eye(4), [0, 1, 3, 0], [1, 0, 2, 1], [1.0, 1.0, 1.0, 0.5], [0, 1, 1, 0])
    matrix = LabelMatrix.of(comparisons)
    assert (matrix.a.tolist(), matrix.b.tolist()) == ([0, 2], [1, 3])
    # the mean of user 0's two labels; user 1 prefers item 1, and item 3; user 0 did not compare items 2 and 3
    np.testing.assert_array_equal(matrix.labels, [[0.75, np.nan], [0.0, 0.0]])


def test_no_comparisons_give_an_empty_matrix() -> None:
    matrix = LabelMatrix.of(Comparisons(np.eye(2), [], [], [], []))
    assert matrix.labels.shape == (0, 0)


def test_imputation_at_the_wanted_rank_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    labels = np.where(rng.random((7, 9)) < 0.4, np.nan, rng.integers(0, 2, (7, 9)).astype(float))
    users, pairs = impute(labels, 2, rounds=3)
    filled = np.nan_to_num(labels, nan=0.5) - 0.5
    for _ in range(3):
        # the best approximation of rank 2, by eigenvectors instead of an SVD
        _, vectors = np.linalg.eigh(filled.T @ filled)
        best = filled @ vectors[:, -2:] @ vectors[:, -2:].T
        filled = np.where(np.isnan(labels), np.clip(best, -0.5, 0.5), labels - 0.5)
    _, vectors = np.linalg.eigh(filled.T @ filled)
    np.testing.assert_allclose(users @ pairs.T, filled @ vectors[:, -2:] @ vectors[:, -2:].T, atol=1e-10)
    np.testing.assert_allclose(users.T @ users, pairs.T @ pairs, atol=1e-10)


def test_without_centring_the_first_factor_is_the_constant() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((40, 50)) < 0.5).astype(float)
    users, pairs = impute(labels, 1, centred=False)
    # random labels share nothing else: the mean label of a pair has the standard deviation sqrt(1/4 / 40) = 0.08
    approximation = users @ pairs.T
    assert np.mean(approximation) == pytest.approx(0.5, abs=0.03)
    assert np.std(approximation) < 0.16
    users, pairs = impute(labels, 1)
    assert abs(np.mean(users @ pairs.T)) < 0.05


def test_a_complete_matrix_of_rank_one_is_recovered_as_margins() -> None:
    """The labels 0.5 + t_u d_p / 4 are the first order of sigmoid(t_u d_p), so the start's margins are t_u d_p."""
    taste_U, rewards_M = np.array([1.0, -0.5, 0.25]), np.array([0.0, 0.6, -0.4, 1.0])
    a, b = np.triu_indices(4, 1)
    users, column = np.divmod(np.arange(3 * len(a)), len(a))
    margins = taste_U[users] * (rewards_M[a] - rewards_M[b])[column]
    comparisons = Comparisons(np.eye(4), a[column], b[column], 0.5 + margins / 4, users)
    for fixed_first in (False, True):
        start = svd_start(comparisons, 2, fixed_first=fixed_first)
        found = np.sum(start.users[users] * (start.vectors[a] - start.vectors[b])[column], axis=1)
        np.testing.assert_allclose(found, margins, atol=1e-12)
        assert not fixed_first or start.users[:, 0] == pytest.approx(np.ones(3))


def test_the_regressions_are_those_of_each_user() -> None:
    rng = np.random.default_rng(1)
    comparisons = Comparisons(
        rng.normal(size=(12, 3)), np.arange(6), np.arange(6, 12), [1, 0, 1, 1, 0, 0.5], [0, 1] * 3
    )
    start = regression_start(comparisons, 2)
    for user in range(2):
        mine = comparisons.of_user(user)
        x_NF = mine.differences
        expected = np.linalg.solve(x_NF.T @ x_NF + 3 * np.eye(3), x_NF.T @ (4 * mine.labels - 2))
        np.testing.assert_allclose(start.vectors @ start.users[user], expected, atol=1e-12)


def test_more_rewards_than_users_or_pairs_leave_columns_of_zeros() -> None:
    comparisons = Comparisons(np.eye(3), [0, 0, 1], [1, 1, 2], [1.0, 0.0, 1.0], [0, 1, 1])
    start = svd_start(comparisons, 5)
    assert start.users.shape == (2, 5)
    assert start.vectors.shape == (3, 5)
    assert not start.users[:, 2:].any()
