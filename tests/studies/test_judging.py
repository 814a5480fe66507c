"""Judges that a study trains: on prompts that nothing else uses, under other instructions, stored and read again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from personalized_soups.declare.evaluation import StudyRecipe, TrainedJudge
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.studies.base_checks import check_base
from personalized_soups.studies.folder import StudyFolder
from personalized_soups.studies.judging import judge_reports, judges_of
from personalized_soups.studies.study import Study

WARM, COLD = "Be warm to the reader.", "Be cold to the reader."


def study_with(judge: TrainedJudge, num_selection: int = 4) -> Study:
    recipe = load(shipped_recipe("evaluation/quickstart.yaml"), StudyRecipe)
    others: dict[str, Any] = {
        name: {"kind": "length", "low": 1, "high": 9} for name in ("expertise", "informativeness")
    }
    selection = recipe.selection.replaced(num_prompts=num_selection)
    return Study(recipe=recipe.replaced(judges={**others, "style": judge}, selection=selection))


class Answers:
    """Stands in for `Answering`: an instruction decides the tone of every answer. It counts the jobs that it ran."""

    def __init__(self, study: Study, out: Path) -> None:
        self.study = study
        self.folder = StudyFolder(out)
        self.asked: list[str] = []

    def job(self, name: str, soup: object, prompts: list[str], *, seed: int) -> Any:
        assert soup is None
        return SimpleNamespace(name=name, prompts=prompts, seed=seed)

    def answered(self, title: str, stage: str, jobs: list[Any]) -> dict[str, list[str]]:
        assert len({job.seed for job in jobs}) == len(jobs)
        self.asked += [prompt for job in jobs for prompt in job.prompts]
        tones = {True: "I am so glad you ask, dear friend", False: "Stop asking me such dull questions"}
        return {job.name: [f"{tones[WARM in prompt]}: {prompt.split()[-1]}" for prompt in job.prompts] for job in jobs}


@pytest.fixture
def judge() -> TrainedJudge:
    return TrainedJudge(kind="trained", high=(WARM,), low=(COLD,), num_prompts=12)


def test_a_judge_is_trained_once_and_tells_the_tones_apart(judge: TrainedJudge, tmp_path: Path) -> None:
    answering: Any = Answers(study_with(judge), tmp_path)
    judges = judges_of(answering)
    assert len(answering.asked) == 24
    assert judges_of(answering) == judges
    assert len(answering.asked) == 24  # a second call reads the stored judge
    assert judges["expertise"].kind == "length"
    (report,) = judge_reports(answering).values()
    assert report["auc"] == 1.0
    assert report["num_answers"] == 24
    judge_of_all = answering.study.grader(judges, None).judge
    assert judge_of_all is not None
    warm, cold = judge_of_all.toward(["Hi", "Hi"], ["I am so glad, dear friend", "Stop asking such dull questions"])
    assert warm["friendly"] > 0.5 > cold["friendly"]


def test_its_prompts_choose_no_method_and_are_in_no_other_split(judge: TrainedJudge) -> None:
    study = study_with(judge)
    prompts = study.judge_prompts(12)
    assert len(set(prompts)) == 12
    assert not {*prompts} & {*study.validation_prompts, *study.train_prompts, *study.test_prompts}


def test_too_few_prompts_are_named_before_anything_is_computed(judge: TrainedJudge) -> None:
    study = study_with(judge.replaced(num_prompts=100_000))
    with pytest.raises(InputError, match="a judge needs 100000 validation prompts on which nothing is chosen"):
        check_base(study)


def test_a_judge_under_the_instruction_of_a_side_is_rejected() -> None:
    with pytest.raises(DeclarationError, match="trained under the instruction of a side: 'Be warm and friendly"):
        study_with(TrainedJudge(kind="trained", high=("Be warm and friendly.",), low=(COLD,)))
