"""The step that grades the answers of all systems, and writes results, tables, pictures and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.declare.run_recipe import ReportStep
from personalized_soups.studies.pipeline.answering import Combination, read_answers
from personalized_soups.studies.pipeline.run_folder import recorded_seconds
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.targets import Target, combination_name
from personalized_soups.studies.pipeline.world import World

if TYPE_CHECKING:
    from personalized_soups.evaluation.page import Sample
    from personalized_soups.evaluation.systems import GradedAnswers, SystemsResults, TrainingCost

RESULTS, MARKDOWN, PAGE, ANSWERS = "results.json", "report.md", "report.html", "answers.parquet"
# The page shows the answers to so many prompts.
_SAMPLED_PROMPTS = 6


@dataclass(frozen=True, slots=True)
class ReportOn:
    """Reports on systems.

    Attributes:
        world: what all steps share.
        step: the declared step.
        combinations: the combinations of sides.
        trainings: for each system, the train step of its models and the targets. The step of the base is empty.
    """

    world: World
    step: ReportStep
    combinations: tuple[Combination, ...]
    trainings: Mapping[str, tuple[str, list[Target]]]

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write the files of the report."""
        from personalized_soups.evaluation.page import as_html, as_markdown
        from personalized_soups.evaluation.pictures.systems import draw_radars, draw_trainings, draw_win_rates
        from personalized_soups.evaluation.systems import compare_systems
        from personalized_soups.evaluation.systems_report import systems_report

        graded = self._graded(inputs, report)
        results = compare_systems(
            graded,
            dimensions=list(self.world.catalogue.dimensions),
            primary=self.step.primary,
            costs=[self._cost(system, inputs) for system in self.step.systems],
            seed=self.world.seed,
        )
        report("drawing")
        pictures = {
            "win_rates": draw_win_rates(results, work / "win_rates.png"),
            "radars": draw_radars(results, work / "radars.png"),
            "trainings": draw_trainings(results, work / "trainings.png"),
        }
        parts = systems_report(results, pictures=pictures, samples=self._samples(graded))
        _write(work, results, as_markdown(parts), as_html(parts), _rows(graded))

    def _graded(self, inputs: Mapping[str, Path], report: Report) -> GradedAnswers:
        from personalized_soups.evaluation.grading import Grader, judging_catalogue

        catalogue, judges = self.world.catalogue, self.step.judges
        grader = Grader(catalogue, judging_catalogue(catalogue, judges) if judges else None)
        graded = {}
        for system in self.step.systems:
            report(f"grading {system}")
            found = {sides: grader.graded(*both) for sides, both in read_answers(inputs[system]).items()}
            graded[system] = {sides: found[sides if sides in found else ()] for sides in self.combinations}
        return graded

    def _cost(self, system: str, inputs: Mapping[str, Path]) -> TrainingCost:
        trained, targets = self.trainings[system]
        folders = [inputs[f"{trained}-{target.name}"] for target in targets]
        return {
            "system": system,
            "trainings": len(targets),
            "grows": _grows(targets),
            "seconds": sum(map(recorded_seconds, folders)),
            "num_bytes": sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")),
        }

    def _samples(self, graded: GradedAnswers) -> list[Sample]:
        from personalized_soups.evaluation.page import Sample

        return [
            Sample(entry.prompt, " + ".join(sides), system.replace("_", " "), entry.answer, entry.valid)
            for at in range(min(_SAMPLED_PROMPTS, len(next(iter(graded[self.step.systems[0]].values())))))
            for sides in self.combinations
            for system in self.step.systems
            for entry in (graded[system][sides][at],)
        ]


def _grows(targets: Sequence[Target]) -> str:
    """Return how the number of trainings grows with the number n of dimensions."""
    return {"side": "2n", "combination": "2^n", "single": "1"}[targets[0].kind] if targets else "0"


def _rows(graded: GradedAnswers) -> list[dict[str, Any]]:
    """Return a row for each answer, with its scores towards the sides of its combination."""
    return [
        {
            "system": system,
            "combination": combination_name(sides),
            "prompt": entry.prompt,
            "answer": entry.answer,
            "valid": entry.valid,
            **{f"score_{place}": entry.toward[side] for place, side in enumerate(sides, start=1)},
            **{f"judged_{place}": entry.judged.get(side) for place, side in enumerate(sides, start=1)},
        }
        for system, by_combination in graded.items()
        for sides, entries in by_combination.items()
        for entry in entries
    ]


def _write(work: Path, results: SystemsResults, markdown: str, page: str, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset

    (work / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    (work / MARKDOWN).write_text(markdown, encoding="utf-8")
    (work / PAGE).write_text(page, encoding="utf-8")
    Dataset.from_list(rows).to_parquet(work / ANSWERS)
