"""Simulated users."""

from __future__ import annotations

import numpy as np
import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.evidence import Question
from personalized_soups.declare.loader import load
from personalized_soups.declare.persona import Change, Persona
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.tiny.scorers import expertise, informativeness, style
from personalized_soups.tiny.simulated_users import (
    KINDS,
    PersonaRewards,
    SimulatedUser,
    choose,
    draw_personas,
    logistic_labels,
)

CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
REWARDS = PersonaRewards(CATALOGUE)
PROMPT = "How do I clean an old kettle?"
FRIENDLY = "Great question! Wipe the old kettle with a wet rag. Have fun!"
PLAIN = "Wipe the old kettle with a wet rag."
BROKEN = "Wipe wipe the the kettle lamp."


def test_the_reward_is_the_weighted_sum_of_the_scorers_values() -> None:
    persona = Persona(weights={"style": 0.7, "concise": 1.5, "expertise": -0.3}, invalid=3.0)
    items = [TextItem(PROMPT, answer) for answer in (FRIENDLY, PLAIN, BROKEN)]
    assert [style(PROMPT, answer).valid for answer in (FRIENDLY, PLAIN, BROKEN)] == [True, True, False]
    expected = [
        0.7 * (2 * style(PROMPT, answer).value - 1)
        - 1.5 * (2 * informativeness(PROMPT, answer).value - 1)
        - 0.3 * (2 * expertise(PROMPT, answer).value - 1)
        for answer in (FRIENDLY, PLAIN)
    ]
    np.testing.assert_allclose(REWARDS.of(persona, items), [*expected, -3.0], rtol=1e-12)


def test_a_phrase_counts_in_valid_answers_only() -> None:
    persona = Persona(phrases={"r": 2.0}, invalid=1.0)
    items = [TextItem(PROMPT, PLAIN), TextItem(PROMPT, BROKEN + "r" * 50)]
    assert REWARDS.of(persona, items).tolist() == [2.0 * PLAIN.count("r"), -1.0]


def test_exact_users_choose_the_better_answer_and_call_ties() -> None:
    warm = SimulatedUser(Persona(weights={"friendly": 1.0}), REWARDS)
    assert warm.choice(Question(id="q1", prompt=PROMPT, a=FRIENDLY, b=PLAIN)) == "a"
    assert warm.choice(Question(id="q2", prompt=PROMPT, a=PLAIN, b=FRIENDLY)) == "b"
    calm = SimulatedUser(Persona(weights={"friendly": 1.0}, ties_within=2.0), REWARDS)
    assert calm.choice(Question(id="q1", prompt=PROMPT, a=FRIENDLY, b=PLAIN)) == "tie"
    pairs = [(TextItem(PROMPT, FRIENDLY), TextItem(PROMPT, PLAIN)), (TextItem(PROMPT, PLAIN), TextItem(PROMPT, PLAIN))]
    assert warm.prefers(pairs).tolist() == [1.0, 0.5]


def test_a_changing_user_changes_after_its_answers() -> None:
    persona = Persona(weights={"friendly": 1.0}, change=Change(after=3, weights={"unfriendly": 1.0}))
    user = SimulatedUser(persona, REWARDS)
    question = Question(id="q1", prompt=PROMPT, a=FRIENDLY, b=PLAIN)
    assert [user.choice(question, num_answers=count) for count in (0, 2, 3, 9)] == ["a", "a", "b", "b"]


@pytest.mark.parametrize(
    ("fields", "margin", "expected"),
    [
        ({"temperature": 0.5}, 0.4, {"a": 1 / (1 + np.exp(-0.8)), "b": 1 - 1 / (1 + np.exp(-0.8))}),
        ({"temperature": 0.5}, -0.4, {"a": 1 - 1 / (1 + np.exp(-0.8)), "b": 1 / (1 + np.exp(-0.8))}),
        ({"noise": 0.2}, 1.0, {"a": 0.8, "b": 0.2}),
        ({"skips": 0.3}, 1.0, {"a": 0.7, "skip": 0.3}),
        ({"noise": 0.1, "temperature": 1.0}, 1e-9, {"a": 0.5, "b": 0.5}),
    ],
)
def test_the_frequencies_of_choices_are_the_declared_probabilities(
    fields: dict[str, float], margin: float, expected: dict[str, float]
) -> None:
    persona = Persona(weights={"style": 1.0}).replaced(**fields)
    choices: list[str] = [choose(persona, margin, f"q{at}") for at in range(4000)]
    assert set(choices) == set(expected)
    for choice, probability in expected.items():
        # 4 standard deviations of a binomial share
        bound = 4 * np.sqrt(probability * (1 - probability) / 4000)
        assert abs(choices.count(choice) / 4000 - probability) < bound


def test_answers_depend_on_the_seed_and_the_name_but_not_on_the_order() -> None:
    noisy = Persona(weights={"style": 1.0}, temperature=1.0)
    once = [choose(noisy, 0.1, f"q{at}") for at in range(40)]
    assert [choose(noisy, 0.1, f"q{at}") for at in reversed(range(40))] == once[::-1]
    assert [choose(noisy.replaced(seed=1), 0.1, f"q{at}") for at in range(40)] != once
    assert [choose(noisy.replaced(name="other"), 0.1, f"q{at}") for at in range(40)] != once


def test_thousands_of_users_are_drawn_and_each_depends_only_on_its_place() -> None:
    for kind in KINDS:
        many = draw_personas(kind, 1000, REWARDS.dimensions, seed=3)
        assert many[:5] == draw_personas(kind, 5, REWARDS.dimensions, seed=3)
        assert len({persona.model_dump_json() for persona in many}) == 1000
    weights = np.array([list(persona.weights.values()) for persona in draw_personas("exact", 1000, ["x", "y"], seed=0)])
    # standard normal: 4 standard errors of the mean and of the variance of 1000 draws
    assert np.abs(weights.mean(axis=0)).max() < 4 / np.sqrt(1000)
    assert np.abs(weights.var(axis=0) - 1).max() < 4 * np.sqrt(2 / 1000)


def test_users_outside_every_dimension_weigh_none() -> None:
    for persona in draw_personas("outside", 20, REWARDS.dimensions, seed=0):
        assert persona.by_dimension(CATALOGUE) == {}
        assert persona.phrases


def test_logistic_labels_have_the_frequencies_of_the_model() -> None:
    rng = np.random.default_rng(0)
    weights, differences = np.array([[1.0, -0.5], [0.2, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    draws = np.stack([logistic_labels(weights, differences, rng, temperature=0.7) for _ in range(4000)])
    expected = 1 / (1 + np.exp(-weights @ differences.T / 0.7))
    assert np.abs(draws.mean(axis=0) - expected).max() < 4 * 0.5 / np.sqrt(4000)
    assert logistic_labels(weights, differences, rng, temperature=0).tolist() == [[1, 0, 1], [1, 0, 1]]
