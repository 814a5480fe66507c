"""Judges that compare values, and judges that a file declares."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch

from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.judging.open_judge import open_judge
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement
from personalized_soups.scoring.judging.value_judges import RewardModelJudge, ScorerJudge
from personalized_soups.scoring.reward_models import RewardModels
from personalized_soups.scoring.scorers import Scored, length_scorer

COMPARISONS = [
    ComparedAnswers("Why?", "one two three four", "one two"),
    ComparedAnswers("Why?", "one", "one two"),
    ComparedAnswers("Why?", "one two", "three four"),
]


def test_a_scorer_judges_by_the_gap_at_one_end() -> None:
    scorer = length_scorer(low=0, high=10)
    done: list[int] = []
    verdicts = [
        [judgement.verdict for judgement in judge.compare(COMPARISONS, on_done=done.append)]
        for judge in (ScorerJudge(scorer), ScorerJudge(scorer, end="low"), ScorerJudge(scorer, min_gap=0.1))
    ]
    assert verdicts == [["first", "second", "tie"], ["second", "first", "tie"], ["first", "tie", "tie"]]
    assert done == [1, 2, 3] * 3


def test_an_invalid_answer_loses_at_both_ends() -> None:
    def only_long(prompt: str, answer: str, /) -> Scored:
        return Scored(0.5, valid=len(answer) > 3)

    ends: tuple[Literal["low", "high"], ...] = ("low", "high")
    for end in ends:
        judge = ScorerJudge(only_long, end=end)
        assert judge.compare([ComparedAnswers("Why?", "one", "three")])[0].verdict == "second"


@pytest.mark.parametrize(
    ("gap", "min_gap", "verdict"), [(0.0, 0.0, "tie"), (0.3, 0.3, "tie"), (0.31, 0.3, "first"), (-0.31, 0.3, "second")]
)
def test_a_gap_that_is_not_larger_than_the_least_is_a_tie(gap: float, min_gap: float, verdict: str) -> None:
    assert Judgement.of_gap(gap, min_gap).verdict == verdict
    assert Judgement.of_gap(gap, min_gap).orders == (verdict, verdict)


def reward_model(folder: Path, small_base: Path) -> Path:
    """Write a reward model of the small base with a random output layer."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(str(small_base), num_labels=1)
    model.save_pretrained(str(folder))
    AutoTokenizer.from_pretrained(str(small_base)).save_pretrained(str(folder))
    return folder


def test_a_reward_model_judges_by_its_output(small_base: Path, tmp_path: Path) -> None:
    folder = reward_model(tmp_path / "model", small_base)
    models = RewardModels({"good": folder}, device="cpu")
    rewards = models.features([TextItem("Why?", text) for text in ("one two", "one", "three four")])[:, 0]
    gap = float(rewards[0] - rewards[1])
    assert gap != 0
    comparisons = [ComparedAnswers("Why?", "one two", "one"), ComparedAnswers("Why?", "one two", "three four")]
    (tmp_path / "judge.yaml").write_text("judge: {kind: reward_model, model: model}\n")
    with open_judge(tmp_path / "judge.yaml", device="cpu") as judge:  # the path starts at the file's folder
        verdicts = [judgement.verdict for judgement in judge.compare(comparisons)]
        assert judge.settings["kind"] == "reward_model"
    assert verdicts == ["first" if rewards[0] > other else "second" for other in rewards[1:]]
    assert RewardModelJudge(models, min_gap=abs(gap)).compare(comparisons)[0].verdict == "tie"


def test_a_file_declares_a_scorer(tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text("judge:\n  kind: scorer\n  scorer: {kind: length, low: 0, high: 10}\n  end: low\n  min_gap: 0.1\n")
    with open_judge(path) as judge:
        assert [judgement.verdict for judgement in judge.compare(COMPARISONS)] == ["second", "tie", "tie"]
        scorer = {"kind": "length", "low": 0, "high": 10}
        assert judge.settings == {"kind": "scorer", "scorer": scorer, "end": "low", "min_gap": 0.1}


@pytest.mark.parametrize(
    ("text", "error", "message", "place"),
    [
        ("judge: {kind: oracle}", DeclarationError, "oracle", ":1"),
        ("judge: {kind: llm}", DeclarationError, "model", ":1"),
        ("judge: {kind: llm, model: m, concurrency: 0}", DeclarationError, "concurrency", ":1"),
        ("judge: {kind: llm, model: m, template: no.txt}", InputError, "template cannot be read", "no.txt"),
        (
            "judge:\n  kind: scorer\n  scorer:\n    kind: python\n    function: nowhere:x",
            DeclarationError,
            "cannot be imported",
            ":5: judge.scorer.function",
        ),
    ],
)
def test_a_wrong_file_is_rejected(text: str, error: type[InputError], message: str, place: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.yaml"
    path.write_text(text)
    with pytest.raises(error) as caught, open_judge(path):
        pass
    assert message in f"{caught.value.what} {caught.value.where}"
    assert place in caught.value.where
