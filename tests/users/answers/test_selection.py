"""The choice of the next question."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from personalized_soups.users.answers.estimate import Estimate, estimate_weights, sigmoid
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.selection import Rule, next_question, question_scores

RULES: tuple[Rule, ...] = get_args(Rule)


def estimate(num_rewards: int = 3, seed: int = 0) -> Estimate:
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(num_rewards, num_rewards))
    return Estimate(rng.normal(size=num_rewards), root @ root.T + 0.1 * np.eye(num_rewards), 3)


def test_the_variance_rule_is_the_reference_code_rule() -> None:
    current, rng = estimate(), np.random.default_rng(1)
    differences = rng.normal(size=(8, 3))
    expected = []
    for v in differences:
        s = 1 / (1 + np.exp(-current.mean @ v))
        expected.append((s * (1 - s)) ** 2 * (v @ current.covariance @ v))
    np.testing.assert_allclose(question_scores(current, differences, "variance", rng), expected, rtol=1e-12)


def test_the_information_rule_is_the_growth_of_the_log_determinant() -> None:
    current, rng = estimate(), np.random.default_rng(2)
    differences = rng.normal(size=(8, 3))
    precision = np.linalg.inv(current.covariance)
    expected = []
    for v in differences:
        s = 1 / (1 + np.exp(-current.mean @ v))
        after = precision + s * (1 - s) * np.outer(v, v)
        expected.append(np.linalg.slogdet(after)[1] - np.linalg.slogdet(precision)[1])
    np.testing.assert_allclose(question_scores(current, differences, "information", rng), expected, rtol=1e-9)


def test_thompson_asks_the_closest_call_of_drawn_weights() -> None:
    certain = Estimate(np.array([1.0, 0.0]), 1e-18 * np.eye(2), 5)
    differences = np.array([[1.0, 0.1], [0.01, 3.0], [2.0, 0.0], [0.0, 0.0]])
    assert next_question(certain, differences, rule="thompson") == 1


@pytest.mark.parametrize("rule", RULES)
def test_every_question_is_asked_once(rule: Rule) -> None:
    current, rng = estimate(), np.random.default_rng(3)
    differences = rng.normal(size=(12, 3))
    asked: list[int] = []
    while (question := next_question(current, differences, asked=asked, rule=rule, rng=rng)) is not None:
        asked.append(question)
    assert sorted(asked) == list(range(12))


@pytest.mark.parametrize("rule", RULES)
def test_a_prompt_returns_only_after_all_others(rule: Rule) -> None:
    current, rng = estimate(), np.random.default_rng(4)
    prompts = ["clean", "clean", "paint", "paint", "paint", "dry"]
    differences = rng.normal(size=(6, 3))
    asked: list[int] = []
    for _ in range(6):
        question = next_question(current, differences, asked=asked, prompts=prompts, rule=rule, rng=rng)
        assert question is not None
        asked.append(question)
    order = [prompts[question] for question in asked]
    assert sorted(order[:3]) == ["clean", "dry", "paint"]
    assert sorted(order[3:5]) == ["clean", "paint"]


def test_active_questions_find_the_weights_sooner_than_random_ones() -> None:
    """The purpose of the rules: after 8 answers of 60 users, active questions leave a clearly smaller error."""
    rng = np.random.default_rng(5)
    # most questions differ in one reward only, so a random question is rarely informative on the others
    differences = rng.normal(size=(200, 4)) * np.where(rng.random((200, 1)) < 0.85, [2.0, 0.1, 0.1, 0.1], 1.0)
    prior = GaussianPrior.ridge(4)
    held_out = rng.normal(size=(300, 4))
    agreement: dict[str, list[float]] = {rule: [] for rule in RULES}
    for _ in range(60):
        truth = rng.normal(size=4)
        for rule in RULES:
            asked: list[int] = []
            labels: list[float] = []
            for _ in range(8):
                current = estimate_weights(differences[asked], labels, prior)
                question = next_question(current, differences, asked=asked, rule=rule, rng=rng)
                assert question is not None
                asked.append(question)
                labels.append(float(rng.random() < sigmoid(differences[question] @ truth * 3)))
            current = estimate_weights(differences[asked], labels, prior)
            agreement[rule].append(float(np.mean((held_out @ current.mean > 0) == (held_out @ truth > 0))))
    means = {rule: float(np.mean(values)) for rule, values in agreement.items()}
    # a mean of 60 users has a standard error of about 0.015
    assert means["information"] > means["random"] + 0.05
    assert means["variance"] > means["random"] + 0.04
