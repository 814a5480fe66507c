from __future__ import annotations

import numpy as np
import pytest
import torch

from personalized_soups.scoring.classifiers.logistic import fit_logistic
from personalized_soups.scoring.classifiers.rows import DenseRows, Floats, SparseRows


def _loss(rows_NF: Floats, is_high: Floats, importance: Floats, penalty: float, point: Floats) -> float:
    """The documented loss, in plain NumPy."""
    share = importance / importance.sum()
    log_odds = rows_NF @ point[:-1] + point[-1]
    signs = 2 * is_high - 1
    return float(share @ np.log1p(np.exp(-signs * log_odds)) + penalty / 2 * point[:-1] @ point[:-1])


def _data(seed: int, num: int = 40, width: int = 7) -> tuple[Floats, Floats, Floats]:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num, width)) * (rng.random((num, width)) < 0.4)
    is_high = (rows[:, 0] + rng.standard_normal(num) > 0).astype(np.float64)
    return rows, is_high, rng.random(num) + 0.1


def _by_lbfgs(rows_NF: Floats, is_high: Floats, importance: Floats, penalty: float) -> Floats:
    """Another program: torch's L-BFGS with automatic derivatives."""
    rows, signs = torch.tensor(rows_NF), torch.tensor(2 * is_high - 1)
    share = torch.tensor(importance / importance.sum())
    point = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [point], max_iter=1000, tolerance_grad=1e-11, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        log_odds = rows @ point[:-1] + point[-1]
        loss = (share * torch.nn.functional.softplus(-signs * log_odds)).sum() + penalty / 2 * point[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return point.detach().numpy()


@pytest.mark.parametrize("penalty", [1e-3, 1e-1])
@pytest.mark.parametrize("seed", range(3))
def test_it_finds_the_minimum_that_another_optimizer_finds(seed: int, penalty: float) -> None:
    rows, is_high, importance = _data(seed)
    model = fit_logistic(DenseRows(rows), is_high, importance, penalty)
    expected = _by_lbfgs(rows, is_high, importance, penalty)
    # Both gradients are below 1e-9, and the loss has a curvature of at least the penalty in every weight. The intercept
    # has the curvature of the data, which is greater than 1e-2 here.
    bound = 2 * np.sqrt(8) * 1e-9 / min(penalty, 1e-2)
    assert np.abs(np.append(model.weights, model.intercept) - expected).max() < bound


def test_the_gradient_is_zero_by_finite_differences() -> None:
    rows, is_high, importance = _data(9)
    model = fit_logistic(DenseRows(rows), is_high, importance, 0.01)
    point, step = np.append(model.weights, model.intercept), 1e-5
    for index in range(len(point)):
        shift = step * (np.arange(len(point)) == index)
        up = _loss(rows, is_high, importance, 0.01, point + shift)
        down = _loss(rows, is_high, importance, 0.01, point - shift)
        # the loss is rounded to about 1e-16, which the division by 2e-5 makes 1e-11; the step's own error is step^2
        assert abs(up - down) / (2 * step) < 1e-9


def test_separable_classes_have_a_finite_solution() -> None:
    rows = np.array([[2.0], [1.0], [-1.0], [-3.0]])
    labels = np.array([1.0, 1.0, 0.0, 0.0])
    model = fit_logistic(DenseRows(rows), labels, np.ones(4), 1e-6)
    assert np.isfinite(model.weights).all()
    assert ((model.log_odds(DenseRows(rows)) > 0) == (labels > 0)).all()


def test_importance_counts_as_repetition_does_and_0_removes_a_text() -> None:
    rows, is_high, _ = _data(5, num=20)
    times = np.array([2.0, 0.0, 1.0, 3.0] * 5)
    weighted = fit_logistic(DenseRows(rows), is_high, times, 0.01)
    repeat = np.repeat(np.arange(20), times.astype(int))
    repeated = fit_logistic(DenseRows(rows[repeat]), is_high[repeat], np.ones(len(repeat)), 0.01)
    np.testing.assert_allclose(weighted.weights, repeated.weights, atol=1e-6)
    assert weighted.intercept == pytest.approx(repeated.intercept, abs=1e-6)


def test_sparse_rows_equal_dense_rows_also_with_empty_rows() -> None:
    rows, is_high, importance = _data(3)
    rows[[0, 7, 39]] = 0.0
    entries = [(np.flatnonzero(row).tolist(), row[np.flatnonzero(row)].tolist()) for row in rows]
    sparse = SparseRows.of(entries, rows.shape[1])
    rng = np.random.default_rng(0)
    vector_F: Floats = rng.standard_normal((rows.shape[1],))
    vector_N: Floats = rng.standard_normal((len(rows),))
    np.testing.assert_allclose(sparse.dot(vector_F), rows @ vector_F, atol=1e-14)
    np.testing.assert_allclose(sparse.transposed_dot(vector_N), vector_N @ rows, atol=1e-14)
    chosen = np.array([39, 3, 0, 3, 8])
    np.testing.assert_allclose(sparse[chosen].dot(vector_F), rows[chosen] @ vector_F, atol=1e-14)
    np.testing.assert_allclose(sparse[chosen].transposed_dot(vector_N[:5]), vector_N[:5] @ rows[chosen], atol=1e-14)
    one, other = (fit_logistic(kind, is_high, importance, 0.01) for kind in (sparse, DenseRows(rows)))
    np.testing.assert_allclose(one.weights, other.weights, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "importance", "penalty"), [([1, 1], [1, 1], 1), ([1, 0], [1, 0], 1), ([1, 0], [1, 1], 0)]
)
def test_one_class_and_no_penalty_are_rejected(labels: list[int], importance: list[int], penalty: float) -> None:
    with pytest.raises(ValueError, match=r"class|penalty"):
        fit_logistic(DenseRows(np.ones((2, 1))), np.array(labels, float), np.array(importance, float), penalty)
