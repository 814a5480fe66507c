"""The judges that a study trains: classifiers of the base's answers under instructions of the two ends."""

from __future__ import annotations

import json
from pathlib import Path

from personalized_soups.declare.dimension import AnyScorer, ClassifierScorer
from personalized_soups.declare.evaluation import TrainedJudge
from personalized_soups.evaluation.results import JudgeReport
from personalized_soups.generation.prompts import with_text_before
from personalized_soups.scoring.answer_classifiers import train_answer_classifier
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.studies.answering import Answering
from personalized_soups.studies.folder import write_text

# The pool has the seeds from 1000 * seed, and the calibration of the gate those from 1000 * seed + 500.
_SEEDS = 700


def judges_of(answering: Answering) -> dict[str, AnyScorer]:
    """Return the judge of each dimension as a scorer. Judges that are not trained yet are trained now, and stored.

    Raises:
        InputError: if there are too few prompts or answers to train on.
    """
    judges: dict[str, AnyScorer] = {}
    for dimension, judge in answering.study.recipe.judges.items():
        if isinstance(judge, TrainedJudge):
            folder = _folder(answering, dimension)
            if not folder.is_dir():
                _train(answering, dimension, judge, folder)
            judges[dimension] = ClassifierScorer(kind="classifier", path=str(folder.absolute()))
        else:
            judges[dimension] = judge
    return judges


def judge_reports(answering: Answering) -> dict[str, JudgeReport]:
    """Return how well each trained judge tells the two ends apart, on prompts that are held out from its training."""
    return {
        dimension: json.loads(_report_file(answering, dimension).read_text(encoding="utf-8"))
        for dimension, judge in answering.study.recipe.judges.items()
        if isinstance(judge, TrainedJudge)
    }


def _train(answering: Answering, dimension: str, judge: TrainedJudge, folder: Path) -> None:
    prompts = answering.study.judge_prompts(judge.num_prompts)
    instructions = [(text, True) for text in judge.high] + [(text, False) for text in judge.low]
    jobs = [
        answering.job(
            f"{dimension} {place}",
            None,
            [str(with_text_before(prompt, text)) for prompt in prompts],
            seed=1000 * answering.study.seed + _SEEDS + place,
        )
        for place, (text, _) in enumerate(instructions)
    ]
    answers = answering.answered(f"training the judge of {dimension}", "judges", jobs)
    ends: dict[bool, list[TextItem]] = {True: [], False: []}
    for job, (_, is_high) in zip(jobs, instructions, strict=True):
        # An empty answer tells nothing.
        pairs = zip(prompts, answers[job.name], strict=True)
        ends[is_high] += [TextItem(prompt, answer) for prompt, answer in pairs if answer.strip()]
    classifier, report = train_answer_classifier(ends[True], ends[False], seed=answering.study.seed)
    content = {
        "num_answers": len(ends[True]) + len(ends[False]),
        "auc": report.auc.value,
        "auc_interval": [report.auc.low, report.auc.high],
    }
    write_text(_report_file(answering, dimension), json.dumps(content, indent=2) + "\n")
    classifier.save(folder, overwrite=True)


def _folder(answering: Answering, dimension: str) -> Path:
    return answering.folder.root / "judges" / dimension


def _report_file(answering: Answering, dimension: str) -> Path:
    return answering.folder.root / "judges" / f"{dimension}.json"
