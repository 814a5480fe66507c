"""Choose each method's weight, the best method and the best single experts, on validation prompts only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from personalized_soups.declare.profile import MethodName, Profile
from personalized_soups.evaluation.comparison import SINGLE_EXPERT
from personalized_soups.evaluation.grading import Grader
from personalized_soups.evaluation.results import Results, ValidationScores
from personalized_soups.evaluation.scores import Graded, joint_share, mean_worth
from personalized_soups.studies.answering import Answering
from personalized_soups.studies.outcome import best_of_method, best_weight, score_selection
from personalized_soups.studies.study import Combination
from personalized_soups.studies.workers import AnswerJob


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen on the validation prompts.

    Attributes:
        weights: the weight of each method.
        best_method: the method with the best joint score at its weight.
        single_experts: for each combination, the best of its three experts alone, at weight 1. It is empty if the
            recipe does not compare single experts.
    """

    weights: Mapping[MethodName, float]
    best_method: MethodName
    single_experts: Mapping[Combination, str]


def choose(answering: Answering, grader: Grader) -> tuple[Choice, list[ValidationScores]]:
    """Score all weights of all methods on the validation prompts. Return what was chosen, and all scores."""
    study, recipe = answering.study, answering.study.recipe.selection
    prompts = study.validation_prompts

    def job(name: str, profile: Profile) -> AnswerJob:
        return answering.job(name, profile, prompts, seed=2000 + study.seed, measured_as=prompts)

    trials = [(method, weight) for method, weights in recipe.weights.items() for weight in weights]
    profiles = {
        (method, weight, sides): Profile(method=method, weights=dict.fromkeys(sides, weight))
        for method, weight in trials
        for sides in study.combinations
    }
    alone = study.catalogue.sides if SINGLE_EXPERT in study.recipe.systems else ()
    soups = {key: job(f"{key[0]} {key[1]:g} {'+'.join(key[2])}", profile) for key, profile in profiles.items()}
    singles = {side: job(f"single {side}", Profile(weights={side: 1.0})) for side in alone}
    title = "choosing method and scale on validation topics"
    answers = answering.answered(title, "validation", [*soups.values(), *singles.values()])
    graded = {key: grader.graded(prompts, answers[job.name]) for key, job in soups.items()}
    by_side = {side: grader.graded(prompts, answers[job.name]) for side, job in singles.items()}
    selection = [
        score_selection(method, weight, {sides: graded[method, weight, sides] for sides in study.combinations})
        for method, weight in trials
    ]
    weights = {method: best_weight(selection, method, min_valid=recipe.min_valid) for method in recipe.weights}
    best_single = {sides: best_expert(by_side, sides) for sides in study.combinations} if by_side else {}
    return Choice(weights, best_of_method(selection, min_valid=recipe.min_valid), best_single), selection


def best_expert(by_side: Mapping[str, Sequence[Graded]], sides: Combination) -> str:
    """Return the expert of `sides` whose answers have the highest joint score for them. The mean score breaks ties."""
    return max(sides, key=lambda side: (joint_share(by_side[side], sides), mean_worth(by_side[side], sides)))


def choice_in(results: Results) -> Choice:
    """Return the choice that the results record."""
    rows = results["comparison"]["rows"] if "comparison" in results else ()
    return Choice(
        {method["method"]: method["weight"] for method in results["methods"]},
        results["best_method"],
        {tuple(row["sides"]): row["expert"] for row in rows if "expert" in row},
    )
