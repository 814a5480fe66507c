"""The steps that choose a weight, sweep between sides, and answer with experts alone and in pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.declare.profile import Profile
from personalized_soups.declare.run_steps import ChooseStep, InterferenceStep, SweepStep
from personalized_soups.mixing.personal_model import PersonalModel
from personalized_soups.studies.pipeline.choosing import Choose
from personalized_soups.studies.pipeline.mixing import Mixing
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.sweeping import (
    MeasureInterference,
    SweepSides,
    read_interference,
    read_sweep,
)
from tests.studies.pipeline.kitchen import COMBINATIONS, PROMPTS, Kitchen

GENERATING: dict[str, Any] = {"prompts": "prompts.txt", "max_new_tokens": 8, "batch_size": 4, "experts": "experts"}


def weights_of(model: PersonalModel) -> dict[str, float]:
    """Return the weights of a mixture, or of the adapter that was merged from them."""
    if model.adapter is not None:
        return dict(json.loads((Path(str(model.adapter)) / "soup.json").read_text())["profile"]["weights"])
    assert isinstance(model.profile, Profile)
    return dict(model.profile.weights)


@pytest.fixture
def answered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Answer as a user wants at a weight of 0.6, and otherwise in neither way. Return the sizes of the batches."""
    sizes: list[int] = []

    def answer(_: Any, prompts: Sequence[str], models: Sequence[PersonalModel], **options: Any) -> list[str]:
        assert options["batch_size"] == len(prompts)
        sizes.append(len(prompts))
        texts = []
        for model in models:
            weights = weights_of(model)
            words = 19 if weights.get("long", 0) == 0.6 else 1 if weights.get("short", 0) == 0.6 else 9
            tone = "lamp" if weights.get("warm", 0) == 0.6 else "soap" if weights.get("cold", 0) == 0.6 else "hat"
            texts.append(" ".join([tone, *["word"] * words]))
        return texts

    monkeypatch.setattr("personalized_soups.mixing.personal_answers.answer", answer)
    return sizes


def chosen(
    kitchen: Kitchen, weights: dict[str, list[float]], *, work: str = "work", report: Report = lambda _: None
) -> dict[str, Any]:
    """Run a choose step, and return what it chose."""
    step = ChooseStep.model_validate({"kind": "choose", "weights": weights, **GENERATING}, strict=False)
    folder = kitchen.folder / work
    folder.mkdir(exist_ok=True)
    mixing = Mixing(kitchen.world.catalogue, None)
    choose = Choose(kitchen.world, step, kitchen.folder / "prompts.txt", COMBINATIONS, mixing)
    choose(folder, kitchen.experts, report)
    return dict(json.loads((folder / "choice.json").read_text()))


def test_the_weight_with_the_best_joint_score_is_chosen(kitchen: Kitchen, answered: list[int]) -> None:
    choice = chosen(kitchen, {"linear": [0.3, 0.6, 0.9], "factor_average": [0.5, 0.6]})
    assert choice["weights"] == {"linear": 0.6, "factor_average": 0.6}
    joint = {(score["method"], score["weight"]): score["joint"] for score in choice["scores"]}
    assert joint["linear", 0.6] == joint["factor_average", 0.6] == 1.0
    assert max(value for (_, weight), value in joint.items() if weight != 0.6) < 1
    assert sum(answered) == 5 * len(COMBINATIONS) * len(PROMPTS)
    # the other method is chosen if it alone has the weight
    assert chosen(kitchen, {"linear": [0.3], "factor_average": [0.6]}, work="other")["method"] == "factor_average"


def test_an_interrupted_choice_keeps_its_answers(kitchen: Kitchen, answered: list[int]) -> None:
    class StoppedError(Exception):
        pass

    def stop(content: Any) -> None:
        if str(content).startswith("8/"):
            raise StoppedError

    weights = {"linear": [0.3, 0.6]}
    whole = chosen(kitchen, weights)
    answered.clear()
    with pytest.raises(StoppedError):
        chosen(kitchen, weights, work="again", report=stop)
    assert answered == [4, 4]
    assert chosen(kitchen, weights, work="again") == whole
    assert answered == [4] * 6
    texts = [(kitchen.folder / work / "answers.jsonl").read_text() for work in ("work", "again")]
    assert texts[0] == texts[1]


def test_a_sweep_answers_with_each_mixture_of_two_sides(kitchen: Kitchen) -> None:
    step = SweepStep(kind="sweep", weight=0.8, num_steps=3, **GENERATING)
    folder = kitchen.folder / "sweep"
    folder.mkdir()
    mixing = Mixing(kitchen.world.catalogue, None, 0.8)
    SweepSides(kitchen.world, step, kitchen.folder / "prompts.txt", COMBINATIONS, mixing)(
        folder, kitchen.experts, lambda _: None
    )
    found = read_sweep(folder)
    assert len(found) == 4 + 4  # the corners of a square, and one mixture within each edge
    assert all(prompts == PROMPTS for prompts, _ in found.values())
    assert (("long", 0.5), ("short", 0.5), ("warm", 1.0)) in found
    # the ends are the answers of the combinations themselves
    corner = kitchen.answered(inputs=kitchen.experts, experts="experts", weight=0.8, work="corners")
    lines = [json.loads(line) for line in (corner / "answers.jsonl").read_text().splitlines()]
    wanted = [line["answer"] for line in lines if line["sides"] == ["long", "warm"]]
    assert found[("long", 1.0), ("warm", 1.0)][1] == wanted


def test_interference_has_the_base_each_expert_and_each_pair_of_two_dimensions(kitchen: Kitchen) -> None:
    step = InterferenceStep(kind="interference", weight=0.6, **GENERATING)
    folder = kitchen.folder / "interference"
    folder.mkdir()
    mixing = Mixing(kitchen.world.catalogue, None, 0.6)
    MeasureInterference(kitchen.world, step, kitchen.folder / "prompts.txt", mixing)(
        folder, kitchen.experts, lambda _: None
    )
    alone = [((side,), weight) for side in ("short", "long", "cold", "warm") for weight in (1.0, 0.6)]
    assert list(read_interference(folder)) == [((), 0.0), *alone, *((pair, 0.6) for pair in COMBINATIONS)]
    doctor = json.loads((folder / "findings.json").read_text())
    assert doctor["weight"] == 0.6
    assert {finding["severity"] for finding in doctor["findings"]} <= {"error", "warning", "note"}
