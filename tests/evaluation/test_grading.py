"""Grading with scorers, held-out judges and a gate."""

from __future__ import annotations

from collections.abc import Sequence

from personalized_soups.declare.dimension import Catalogue, LengthScorer, MarkersScorer
from personalized_soups.declare.loader import load_text
from personalized_soups.evaluation.grading import Grader, ScorerJudge
from personalized_soups.evaluation.scores import Graded

CATALOGUE = load_text(
    """
dimensions:
  length:
    about: How long an answer is.
    scorer: {kind: length, low: 0, high: 10}
    sides:
      short: {instruction: Be short., end: low}
      long: {instruction: Be long., end: high}
  style:
    about: How warm an answer is.
    sides:
      warm: {instruction: Be warm., end: high, scorer: {kind: markers, high: [dear], low: [so what]}}
      cold: {instruction: Be cold., end: low, scorer: {kind: markers, high: [dear], low: [so what]}}
""",
    Catalogue,
    "catalogue",
)
JUDGES = ScorerJudge(
    CATALOGUE,
    {
        "length": LengthScorer(kind="length", low=0, high=5),
        "style": MarkersScorer(kind="markers", high=("friend",), low=("go away",)),
    },
)
PROMPTS = ["a", "b", "c"]
ANSWERS = ["Hello my dear friend of many years", "So what, go away", "dear me"]


class FirstIsBroken:
    """Rejects the first answer, and stores what it was asked."""

    def valid(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[bool]:
        self.asked = (list(prompts), list(answers))
        return [False, *[True] * (len(answers) - 1)]


def test_judges_score_beside_the_scorers() -> None:
    first, second, third = Grader(CATALOGUE, JUDGES).graded(PROMPTS, ANSWERS)
    assert first.toward == {"short": 0.30000000000000004, "long": 0.7, "warm": 1.0, "cold": 0.0}
    assert first.judged == {"short": 0.0, "long": 1.0, "warm": 1.0, "cold": 0.0}
    assert second.judged == {"short": 0.19999999999999996, "long": 0.8, "warm": 0.0, "cold": 1.0}
    assert (third.toward["warm"], third.judged["warm"]) == (1.0, 0.5)  # the judge knows other words


def test_the_gate_makes_an_answer_invalid_for_scorers_and_judges() -> None:
    gate = FirstIsBroken()
    first, second, _ = Grader(CATALOGUE, JUDGES, gate).graded(PROMPTS, ANSWERS)
    nothing = {"short": 0.0, "long": 0.0, "warm": 0.0, "cold": 0.0}
    assert first == Graded("a", ANSWERS[0], valid=False, toward=nothing, judged=nothing)
    assert second == Grader(CATALOGUE, JUDGES).graded(PROMPTS, ANSWERS)[1]
    assert gate.asked == (PROMPTS, ANSWERS)


def test_an_answer_that_a_scorer_calls_invalid_has_no_score_by_the_judges() -> None:
    (silent,) = Grader(CATALOGUE, JUDGES).graded(["a"], ["..."])
    assert not silent.valid
    assert set(silent.judged.values()) == {0.0}


def test_without_judges_and_gate_answers_are_graded_as_before() -> None:
    from personalized_soups.evaluation.scores import grade

    assert Grader(CATALOGUE).graded(PROMPTS, ANSWERS) == grade(PROMPTS, ANSWERS, CATALOGUE, list(CATALOGUE.sides))
