"""Candidates answer in one batch with the same random numbers, and a scorer's name stands for a rating."""

from __future__ import annotations

import sys
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import Any

import pytest

from personalized_soups import (
    Catalogue,
    ExpertWeights,
    Scored,
    ScoredAnswers,
    SoupModel,
    load,
    rating_of,
    shipped_recipe,
    tune_weights,
)
from personalized_soups.declare.loader import load_text
from personalized_soups.errors import DeclarationError, UsageError

PROMPTS = ["wash the kettle", "soap", "rub it dry with a clean towel so that it looks nice"]
CANDIDATES = [ExpertWeights({"cold": 0.9}), ExpertWeights(), ExpertWeights({"cold": 0.9}), ExpertWeights({"warm": 1.2})]


def share_of_spaces(prompt: str, answer: str) -> float:
    return answer.count(" ") / max(1, len(answer))


def spaced(prompt: str, answer: str) -> Scored:
    return Scored(share_of_spaces(prompt, answer), valid=bool(answer))


def _objective(model: SoupModel, **options: Any) -> tuple[ScoredAnswers, list[tuple[str, str]]]:
    seen: list[tuple[str, str]] = []

    def rating(prompt: str, answer: str) -> float:
        seen.append((prompt, answer))
        return float(len(seen))

    return ScoredAnswers(model, PROMPTS, rating, **{"max_new_tokens": 8, **options}), seen


def test_candidates_with_equal_weights_give_equal_answers(model: SoupModel) -> None:
    objective, seen = _objective(model, temperature=1.0)
    scores = objective.scores(CANDIDATES, [0, 1, 2], draw=0)
    assert scores.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    assert [prompt for prompt, _ in seen] == PROMPTS * 4
    assert seen[:3] == seen[6:9]
    assert seen[:3] != seen[3:6]


def test_answers_are_those_of_the_model_alone(model: SoupModel) -> None:
    objective, seen = _objective(model, temperature=0.9, seed=5)
    objective.scores(CANDIDATES, [2, 0], draw=0)
    alone = model.generate(
        [PROMPTS[2], PROMPTS[0]], {"warm": 1.2}, max_new_tokens=8, temperature=0.9, seed=5, places=[2, 0]
    )
    assert [answer for _, answer in seen[-2:]] == alone


def test_the_draw_and_the_seed_change_the_random_numbers(model: SoupModel) -> None:
    def answers(seed: int, draw: int) -> list[tuple[str, str]]:
        objective, seen = _objective(model, temperature=1.0, seed=seed)
        objective.scores([ExpertWeights()], [0, 1, 2], draw=draw)
        return seen

    assert answers(0, 0) == answers(0, 0)
    different = [answers(0, 0), answers(0, 1), answers(1, 0), answers(1, 1)]
    assert all(one != other for place, one in enumerate(different) for other in different[:place])


@pytest.mark.parametrize(("batch_size", "batches"), [(12, 1), (100, 1), (5, 3)])
def test_a_generation_is_one_batch(
    model: SoupModel, monkeypatch: pytest.MonkeyPatch, batch_size: int, batches: int
) -> None:
    objective, _ = _objective(model, batch_size=batch_size)
    rows: list[int] = []
    generate = model.model.generate

    def counting(**options: Any) -> Any:
        rows.append(options["input_ids"].shape[0])
        return generate(**options)

    monkeypatch.setattr(model.model, "generate", counting)
    objective.scores(CANDIDATES, [0, 1, 2], draw=0)
    assert len(rows) == batches
    assert sum(rows) == 12


def test_a_search_raises_the_score_of_answers(model: SoupModel) -> None:
    objective = ScoredAnswers(model, PROMPTS, share_of_spaces, max_new_tokens=12, temperature=0.0)
    tuning = tune_weights(model, objective, budget=40, sigma=1.0)
    start, found = (
        [share_of_spaces(prompt, answer) for prompt, answer in zip(PROMPTS, answers, strict=True)]
        for answers in (
            model.generate(PROMPTS, None, max_new_tokens=12),
            model.generate(PROMPTS, dict(tuning.chosen.weights), max_new_tokens=12),
        )
    )
    assert tuning.start.overall == pytest.approx(sum(start) / 3)
    assert tuning.chosen.overall == pytest.approx(sum(found) / 3)
    assert tuning.best is not None
    assert tuning.best.search >= tuning.start.search


def test_wrong_arguments_are_told(model: SoupModel) -> None:
    with pytest.raises(UsageError, match="there are no prompts"):
        ScoredAnswers(model, [], share_of_spaces)
    with pytest.raises(UsageError, match="batch_size is 0"):
        ScoredAnswers(model, PROMPTS, share_of_spaces, batch_size=0)


CATALOGUE = """
dimensions:
  length:
    about: How long an answer is.
    scorer: {kind: length, low: 0, high: 10}
    sides:
      short: {instruction: Be short., end: low}
      long: {instruction: Be long.}
  mood:
    about: Own scorers alone.
    sides:
      loud: {instruction: Be loud., scorer: {kind: markers, high: [hey], low: []}}
  plain:
    about: No scorer.
    sides:
      bare: {instruction: Be bare.}
"""


@pytest.mark.parametrize(
    ("name", "rating"),
    [("short", 0.8), ("long", 0.2), ("length", 0.2), ("loud", 0.5), ("airy_scorer:spaced", 0.1)],
)
def test_a_name_stands_for_a_rating(name: str, rating: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("airy_scorer")
    module.spaced = spaced  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "airy_scorer", module)
    catalogue = load_text(CATALOGUE, Catalogue, "catalogue.yaml")
    assert rating_of(name, catalogue)("soap", "wash.. it.") == pytest.approx(rating)


def test_an_invalid_answer_has_the_lowest_rating() -> None:
    catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
    assert rating_of("concise", catalogue)("soap", "...") == 0.0


@pytest.mark.parametrize(
    ("name", "what", "mend"),
    [
        ("shrot", "no side, dimension or installed scorer is called 'shrot'", "did you mean 'short'?"),
        ("mood", "every side of the dimension 'mood' has its own scorer", "name a side"),
        ("bare", "the side 'bare' has no scorer", "add a `scorer:`"),
        ("plain", "the side 'bare' has no scorer", "add a `scorer:`"),
        ("nowhere:function", "cannot be imported", "package.module:function"),
    ],
)
def test_a_name_without_a_scorer_is_told(name: str, what: str, mend: str) -> None:
    with pytest.raises(DeclarationError, match=what) as caught:
        rating_of(name, load_text(CATALOGUE, Catalogue, "catalogue.yaml"))
    assert mend in caught.value.mend


def test_an_installed_scorer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("airy", f"{spaced.__module__}:spaced", "personalized_soups.scorers")
    for module in ("personalized_soups.scoring.plugins", "personalized_soups.users.tuning.scored_answers"):
        monkeypatch.setattr(f"{module}.entry_points", lambda group: [point])
    monkeypatch.setattr(EntryPoint, "load", lambda self: spaced)
    catalogue = load_text(CATALOGUE, Catalogue, "catalogue.yaml")
    assert rating_of("airy", catalogue)("soap", "a b") == pytest.approx(1 / 3)
    with pytest.raises(DeclarationError) as caught:
        rating_of("airyy", catalogue)
    assert caught.value.mend == "did you mean 'airy'?"
