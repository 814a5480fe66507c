"""Estimates as preferences in dimensions, as profiles, as sentences and as win rates."""

from __future__ import annotations

import math

import numpy as np
import pytest

from personalized_soups.declare.evidence import Answer, Choice
from personalized_soups.declare.side_rule import SideRule
from personalized_soups.errors import UsageError
from personalized_soups.users.answers.consistency import left_out_probability
from personalized_soups.users.answers.estimate import Estimate, estimate_weights
from personalized_soups.users.answers.preferences import preferences_of
from personalized_soups.users.answers.prior import GaussianPrior
from personalized_soups.users.answers.profile import profile_of
from personalized_soups.users.answers.stopping import StoppingRule, expected_agreement
from personalized_soups.users.answers.win_rate import predicted_win_rate
from personalized_soups.users.answers.wording import notes, summary

EXPERTS = ("friendly", "concise", "unfriendly", "informative", "poetic")
RULE = SideRule(
    {
        "friendly": "style",
        "unfriendly": "style",
        "concise": "informativeness",
        "informative": "informativeness",
    }
)


def of(mean: list[float], variance: float = 0.01) -> Estimate:
    return Estimate(np.array(mean), variance * np.eye(len(mean)), 10)


def test_each_dimension_is_the_difference_of_its_sides() -> None:
    covariance = np.diag([0.3, 0.1, 0.2, 0.1, 0.4])
    covariance[0, 2] = covariance[2, 0] = -0.1
    estimate = Estimate(np.array([1.0, -0.2, 0.4, 0.1, 0.5]), covariance, 10)
    style, length, poetic = preferences_of(estimate, EXPERTS, RULE, level=0.9)
    assert (style.dimension, style.preferred, style.other) == ("style", "friendly", "unfriendly")
    assert style.strength == pytest.approx(0.6)
    # var(w_f - w_u) = 0.3 + 0.2 + 2 * 0.1; the 90% interval has a half width of 1.6449 standard deviations
    assert style.interval == pytest.approx((0.6 - 1.6448536 * math.sqrt(0.7), 0.6 + 1.6448536 * math.sqrt(0.7)))
    assert style.probability == pytest.approx(0.5 * (1 + math.erf(0.6 / math.sqrt(0.7) / math.sqrt(2))))
    assert (length.preferred, length.other) == ("informative", "concise")
    assert (poetic.dimension, poetic.other, poetic.strength) == ("poetic", None, 0.5)


@pytest.mark.parametrize(("strength", "certainty"), [(2.0, "clear"), (1.2, "likely"), (0.5, "open")])
def test_certainty_follows_the_probability_of_the_side(strength: float, certainty: str) -> None:
    estimate = Estimate(np.array([strength, 0.0]), np.eye(2) / 2, 3)  # the difference has variance 1
    (style,) = preferences_of(estimate, ("friendly", "unfriendly"), RULE)
    assert style.certainty == certainty


def test_a_profile_weighs_the_preferred_side_of_each_dimension() -> None:
    differences = np.random.default_rng(0).normal(size=(2000, 5))
    profile = profile_of(of([1.0, 0.0, 0.0, 0.5, -0.5], 1e-6), EXPERTS, differences, RULE, user="ada", scale=0.6)
    assert profile.user == "ada"
    # the rewards have equal spreads, so the weights have the ratio of the strengths, 1 to 0.5
    assert set(profile.weights) == {"friendly", "informative"}
    assert profile.weights["friendly"] == 0.6
    assert profile.weights["informative"] == pytest.approx(0.3, abs=0.02)


def test_a_profile_does_not_depend_on_the_units_of_a_reward() -> None:
    differences = np.random.default_rng(1).normal(size=(500, 5))
    plain = profile_of(of([1.0, 0.0, 0.0, 0.5, 0.2], 1e-9), EXPERTS, differences, RULE)
    units = np.array([1.0, 1.0, 1.0, 10.0, 1.0])
    estimate = Estimate(np.array([1.0, 0.0, 0.0, 0.05, 0.2]), 1e-9 * np.diag(1 / units**2), 10)
    assert profile_of(estimate, EXPERTS, differences * units, RULE).weights == pytest.approx(plain.weights, abs=1e-3)


def test_an_uncertain_dimension_counts_less() -> None:
    differences = np.random.default_rng(2).normal(size=(500, 5))
    estimate = Estimate(np.array([1.0, 1.0, 0.0, 0.0, 0.0]), np.diag([1e-9, 4.0, 1e-9, 4.0, 1e-9]), 4)
    weights = profile_of(estimate, EXPERTS, differences, RULE).weights
    # p = Phi(1 / sqrt(8)) = 0.638, so informativeness counts 2 p - 1 = 0.276 of style
    assert weights["concise"] / weights["friendly"] == pytest.approx(0.276, abs=0.02)


def test_opposed_sides_get_their_own_weights_if_that_is_allowed() -> None:
    profile = profile_of(of([1.0, 0.0, -0.4, 0.5, 0.0]), EXPERTS, np.ones((3, 5)), RULE, scale=0.5, allow_opposed=True)
    assert profile.weights == {"friendly": 0.5, "unfriendly": -0.2, "informative": 0.25}
    assert profile.allow_opposed


def test_an_estimate_without_a_preference_gives_no_profile() -> None:
    with pytest.raises(UsageError, match="no preference"):
        profile_of(of([0.0] * 5), EXPERTS, np.ones((3, 5)), RULE)


def test_the_summary_names_clear_likely_and_open_dimensions() -> None:
    estimate = Estimate(np.array([3.0, 0.0, 0.0, 1.3, 0.1]), np.eye(5) / 2, 10)
    text = summary(preferences_of(estimate, EXPERTS, RULE))
    assert text == (
        "You prefer friendly answers. You probably prefer informative answers. "
        "It is still open whether you prefer poetic answers."
    )


def answers(choices: list[Choice], swapped: list[bool] | None = None) -> list[Answer]:
    orders = swapped or [False] * len(choices)
    return [
        Answer(question=f"q{place}", choice=choice, swapped=order)
        for place, (choice, order) in enumerate(zip(choices, orders, strict=True))
    ]


def notes_of(given: list[Answer]) -> list[str]:
    return notes(given, 0.8)


def test_a_user_who_always_presses_one_button_is_told() -> None:
    swapped = [True, False, True, True, False, False]
    always_first: list[Choice] = ["b", "a", "b", "b", "a", "a"]
    (note,) = notes_of(answers(always_first, swapped))
    assert "chose the first answer all 6 times" in note
    always_second: list[Choice] = ["a", "b", "a", "a", "b", "b"]
    (note,) = notes_of(answers(always_second, swapped))
    assert "chose the second answer all 6 times" in note
    # always `a`, shown in different places, is a preference
    assert not any("all 6 times" in note for note in notes_of(answers(["a"] * 6, swapped)))


def test_only_ties_and_skips_are_told() -> None:
    (note,) = notes_of(answers(["tie", "skip", "tie", "tie", "skip", "tie"]))
    assert "neither answer" in note


def test_contradictory_answers_are_told_and_leave_the_estimate_wide() -> None:
    differences = np.array([[1.0, 0.0]] * 8)
    given = answers(["a", "b"] * 4, [False, True, False, False, True, True, False, True])
    prior = GaussianPrior.ridge(2)
    contradictory = estimate_weights(differences, [1.0, 0.0] * 4, prior)
    (note,) = notes(given, left_out_probability(differences, [1.0, 0.0] * 4, prior))
    assert "contradict" in note
    steady = estimate_weights(differences, [1.0] * 8, prior)
    assert expected_agreement(contradictory, [[1.0, 0.0]]) == pytest.approx(0.5)
    assert expected_agreement(steady, [[1.0, 0.0]]) > 0.95
    left_out = left_out_probability(differences, [1.0] * 8, prior)
    assert notes(answers(["a"] * 8, [False, True] * 4), left_out) == []


@pytest.mark.parametrize("seed", range(4))
def test_left_out_answers_are_predicted_as_by_estimates_without_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    differences, prior = rng.normal(size=(10, 3)), GaussianPrior.ridge(3, penalty=0.3)
    labels = rng.integers(0, 2, size=10).astype(float)
    exact = []
    for place in range(10):
        rest = np.arange(10) != place
        probability = estimate_weights(differences[rest], labels[rest], prior).preference(differences[[place]])[0]
        exact.append(probability if labels[place] == 1 else 1 - probability)
    # the formula takes one Newton step, which is off by some percent of a probability
    assert left_out_probability(differences, labels, prior) == pytest.approx(np.mean(exact), abs=0.03)


def test_a_disliked_expert_without_an_opponent_is_named() -> None:
    estimate = Estimate(np.array([0.0, 0.0, 0.0, 0.0, -3.0]), np.eye(5) / 2, 10)
    poetic = preferences_of(estimate, EXPERTS, RULE)[-1]
    assert (poetic.preferred, poetic.certainty) == ("poetic", "clear")
    assert "You prefer not poetic answers." in summary([poetic])
    differences = np.random.default_rng(4).normal(size=(50, 5))
    liked = Estimate(np.array([2.0, 0.0, 0.0, 0.0, -3.0]), np.eye(5) / 100, 10)
    assert "poetic" not in profile_of(liked, EXPERTS, differences, RULE).weights


def test_the_win_rate_of_a_certain_estimate_is_the_mean_probability() -> None:
    estimate = of([1.0, -1.0], 1e-12)
    differences = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    expected = np.mean([1 / (1 + math.exp(-m)) for m in (1.0, -1.0, 2.0, 0.0)])
    rate = predicted_win_rate(estimate, differences)
    assert rate.mean == pytest.approx(expected, abs=1e-5)
    assert rate.low < expected < rate.high


def test_the_interval_of_a_win_rate_covers_weights_and_prompts() -> None:
    """Over 300 users and sets of prompts, a 90% interval holds the true rate about 90% of the time."""
    rng = np.random.default_rng(3)
    covariance = np.array([[0.5, 0.1], [0.1, 0.3]])
    mean = np.array([0.8, -0.2])
    held = []
    for seed in range(300):
        truth = rng.multivariate_normal(mean, covariance)
        population = rng.normal(loc=[0.5, 0.0], size=(4000, 2))
        true_rate = np.mean(1 / (1 + np.exp(-population @ truth)))
        drawn = population[rng.integers(4000, size=24)]
        rate = predicted_win_rate(Estimate(mean, covariance, 10), drawn, seed=seed, num_samples=400)
        held.append(rate.low <= true_rate <= rate.high)
    # a standard error of 0.017; the bootstrap of 24 prompts is slightly too narrow
    assert 0.84 <= np.mean(held) <= 0.96


def test_a_win_rate_needs_prompts() -> None:
    with pytest.raises(ValueError, match="at least one prompt"):
        predicted_win_rate(of([1.0]), np.zeros((0, 1)))


def test_stopping_at_a_budget_or_a_certainty() -> None:
    certain, differences = of([2.0, 0.0], 1e-4), np.array([[1.0, 0.0], [0.5, 0.1]])
    rule = StoppingRule(max_questions=5, certainty=0.9, min_questions=3)
    assert [rule.is_done(certain, differences, num_asked=count) for count in (0, 2, 3, 5)] == [False, False, True, True]
    unsure = of([0.0, 0.0], 1.0)
    assert [rule.is_done(unsure, differences, num_asked=count) for count in (3, 4, 5)] == [False, False, True]
    assert not StoppingRule(max_questions=5).is_done(certain, differences, num_asked=4)


@pytest.mark.parametrize("options", [{"max_questions": 0}, {"certainty": 0.5}, {"certainty": 1.1}])
def test_impossible_stopping_rules_are_rejected(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        StoppingRule(**options)  # type: ignore[arg-type]
