"""The prior of known users: simulated users with known weights, and files of answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.declare.evidence import Question
from personalized_soups.errors import InputError
from personalized_soups.users.answers.estimate import estimate_weights
from personalized_soups.users.answers.known_users import fit_known_users, fit_prior, read_known_answers
from personalized_soups.users.answers.pool import PoolRecord, QuestionPool
from personalized_soups.users.answers.prior import GaussianPrior

MEAN = np.array([1.0, 0.0, -0.5])
COVARIANCE = np.array([[1.5, 0.6, 0.0], [0.6, 0.8, -0.2], [0.0, -0.2, 0.3]])


def simulated(num_users: int, num_answers: int, *, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """The answers of logistic users whose weights are drawn from N(MEAN, COVARIANCE)."""
    rng = np.random.default_rng(seed)
    evidence = []
    for weights in rng.multivariate_normal(MEAN, COVARIANCE, size=num_users):
        differences = rng.normal(size=(num_answers, 3)) * 1.5
        labels = (rng.random(num_answers) < 1 / (1 + np.exp(-differences @ weights))).astype(float)
        evidence.append((differences, labels))
    return evidence


def test_the_distribution_of_simulated_users_is_found() -> None:
    evidence = simulated(120, 60)
    start = GaussianPrior.ridge(3)
    fitted = fit_prior(evidence, start)
    # the mean of 120 users has standard errors of sqrt(C_dd / 120); 3 of the largest one
    assert np.abs(fitted.mean - MEAN).max() < 3 * np.sqrt(1.5 / 120)
    error = np.linalg.norm(fitted.covariance - COVARIANCE) / np.linalg.norm(COVARIANCE)
    means = np.stack([estimate_weights(*each, start).mean for each in evidence])
    shrunk = np.linalg.norm(GaussianPrior.fit(means).covariance - COVARIANCE) / np.linalg.norm(COVARIANCE)
    # the sample covariance of 120 users has a relative error of about sqrt(2 / 120) = 0.13 in each entry
    assert error < 0.25
    assert error < 0.6 * shrunk


def test_the_fitted_prior_is_the_mean_of_the_posteriors_under_it() -> None:
    """At the maximum, the moments of the users' posteriors and of 3 + 2 pseudo-users are those of the prior."""
    evidence = simulated(15, 8, seed=4)
    fitted = fit_prior(evidence, GaussianPrior.ridge(3))
    posteriors = [estimate_weights(*each, fitted) for each in evidence]
    mean = sum(posterior.mean for posterior in posteriors) / 15
    total = 5 * np.eye(3)
    for posterior in posteriors:
        total += posterior.covariance + np.outer(posterior.mean - mean, posterior.mean - mean)
    # the last step changed the prior by less than 1e-4 of its deviations, and a further step by less
    assert fitted.mean == pytest.approx(mean, abs=2e-4)
    assert fitted.covariance == pytest.approx(total / 20, abs=2e-4)


def test_a_fitted_prior_predicts_new_users_better() -> None:
    fitted = fit_prior(simulated(60, 20), GaussianPrior.ridge(3))

    def log_loss(prior: GaussianPrior) -> float:
        """The mean log loss of 40 further answers of new users, after 3 answers."""
        losses = []
        for differences, labels in simulated(80, 43, seed=9):
            estimate = estimate_weights(differences[:3], labels[:3], prior)
            p = estimate.preference(differences[3:])
            losses.append(-np.mean(labels[3:] * np.log(p) + (1 - labels[3:]) * np.log(1 - p)))
        return float(np.mean(losses))

    assert log_loss(fitted) < log_loss(GaussianPrior.ridge(3)) - 0.02


def test_users_without_noise_give_a_finite_prior() -> None:
    evidence = [(v, (v @ np.array([3.0, 0.0, 1.0]) > 0).astype(float)) for v, _ in simulated(12, 10)]
    fitted = fit_prior(evidence, GaussianPrior.ridge(3))
    assert np.linalg.eigvalsh(fitted.covariance)[-1] < 100
    assert fitted.mean[0] > abs(fitted.mean[1])


def test_the_scale_of_rewards_only_rescales_the_prior() -> None:
    evidence = simulated(30, 12)
    fitted = fit_prior(evidence, GaussianPrior.ridge(3))
    scaled = fit_prior([(1000 * v, y) for v, y in evidence], GaussianPrior.ridge(3, penalty=1e6))
    # both runs stop at the same step, so they differ by rounding only
    assert scaled.mean * 1000 == pytest.approx(fitted.mean, rel=1e-5, abs=1e-6)
    assert scaled.covariance * 1e6 == pytest.approx(fitted.covariance, rel=1e-5, abs=1e-6)


@pytest.fixture
def pool() -> QuestionPool:
    features = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    questions = tuple(Question(id=f"q{at}", prompt="How?", a="So.", b=f"No {at}.") for at in range(5))
    record = PoolRecord(names=("x", "y", "z"), digest="0")
    return QuestionPool(record, questions, features[0], features[1], GaussianPrior.ridge(3))


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_answers_are_read_by_user_and_the_last_one_counts(tmp_path: Path, pool: QuestionPool) -> None:
    path = write(
        tmp_path / "known.jsonl",
        {"user": "u1", "question": "q0", "choice": "a"},
        {"user": "u2", "question": "q0", "choice": "tie"},
        {"user": "u1", "question": "q0", "choice": "b"},
        {"user": "u1", "question": "q3", "choice": "skip"},
        {"user": "u2", "question": "q4", "choice": "a", "probability": 0.7},
    )
    answers = read_known_answers(path, pool)
    labels = {user: [(answer.question, answer.label) for answer in of_user] for user, of_user in answers.items()}
    assert labels == {"u1": [("q0", 0.0), ("q3", None)], "u2": [("q0", 0.5), ("q4", 0.7)]}
    fitted = fit_known_users(pool, answers)
    v = pool.differences
    want = fit_prior([(v[[0]], np.array([0.0])), (v[[0, 4]], np.array([0.5, 0.7]))], pool.prior)
    assert (fitted.prior.mean == want.mean).all()
    assert (fitted.prior.covariance == want.covariance).all()
    assert fitted.record.prior == {"kind": "known users", "num_users": 2, "num_answers": 3}
    assert fitted.questions == pool.questions


def test_wrong_answers_are_named_by_line(tmp_path: Path, pool: QuestionPool) -> None:
    good = {"user": "u1", "question": "q0", "choice": "a"}
    path = write(tmp_path / "known.jsonl", good, {**good, "choice": "c"})
    with pytest.raises(InputError, match="not an answer: choice") as caught:
        read_known_answers(path, pool)
    assert caught.value.where == f"{path}:2"
    write(path, good, good, {**good, "question": "q9"})
    with pytest.raises(InputError, match="the pool has no question 'q9'") as caught:
        read_known_answers(path, pool)
    assert caught.value.where == f"{path}:3"
    with pytest.raises(InputError, match="cannot be read"):
        read_known_answers(tmp_path / "none.jsonl", pool)
    write(path, good, {"user": "u2", "question": "q0", "choice": "skip"})
    with pytest.raises(InputError, match="only 1 users have answered"):
        fit_known_users(pool, read_known_answers(path, pool))
