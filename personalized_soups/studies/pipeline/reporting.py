"""The step that grades the answers of all systems, and writes results, tables, pictures and a page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from personalized_soups.declare.run_steps import ReportStep
from personalized_soups.studies.pipeline.answering import MIXING, Combination, read_answers
from personalized_soups.studies.pipeline.mixing import CHOICE
from personalized_soups.studies.pipeline.run_folder import recorded_seconds
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.sweeping import FINDINGS, Shares, read_interference, read_sweep
from personalized_soups.studies.pipeline.targets import Target, combination_name
from personalized_soups.studies.pipeline.world import World

if TYPE_CHECKING:
    from personalized_soups.evaluation.expert_checks import ExpertChecks, Mixtures
    from personalized_soups.evaluation.grading import Gate, Grader, Judge
    from personalized_soups.evaluation.page import Sample
    from personalized_soups.evaluation.scores import Graded
    from personalized_soups.evaluation.systems import Choice, GradedAnswers, SystemsResults, TrainingCost

    Swept: TypeAlias = Mapping[str, Mapping[Shares, Sequence[Graded]]]

RESULTS, MARKDOWN, PAGE, ANSWERS = "results.json", "report.md", "report.html", "answers.parquet"
# The share of the base's own answers that the fluency gate accepts. Each of its two bounds may reject half of the rest,
# and needs so many answers that this half is one answer.
_ACCEPT = 0.97
LEAST_ANSWERS = ceil(2 / (1 - _ACCEPT)) - 1
# The page shows the answers to so many prompts.
_SAMPLED_PROMPTS = 6


@dataclass(frozen=True, slots=True)
class ReportOn:
    """Reports on systems.

    Attributes:
        world: what all steps share.
        step: the declared step.
        combinations: the combinations of sides.
        trainings: for each system, the train step of its models and the targets. The step is empty for the base, and
            for experts that the run has not trained.
        choices: the choose step of the systems that have one.
        sweeps: the steps of the fronts that are sweeps. The others are systems.
        prefixes: what stands before the names of each seed's steps.
    """

    world: World
    step: ReportStep
    combinations: tuple[Combination, ...]
    trainings: Mapping[str, tuple[str, list[Target]]]
    choices: Mapping[str, str]
    sweeps: tuple[str, ...]
    prefixes: tuple[str, ...]

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write the files of the report."""
        from personalized_soups.evaluation.page import as_html, as_markdown
        from personalized_soups.evaluation.pictures.systems import (
            draw_fronts,
            draw_radars,
            draw_trainings,
            draw_win_rates,
        )
        from personalized_soups.evaluation.systems import compare_systems
        from personalized_soups.evaluation.systems_report import systems_report

        graded, swept, mixtures = self._graded(inputs, report)
        results = compare_systems(
            graded,
            dimensions=list(self.world.catalogue.dimensions),
            primary=self.step.primary,
            costs=[self._cost(system, inputs) for system in self.step.systems if self._has_cost(system)],
            num_seeds=len(self.prefixes),
            seed=self.world.seed,
        )
        results["choices"] = self._choices(inputs)
        self._add_fronts(results, graded, swept, report)
        if self.step.interference is not None:
            results["experts"] = self._experts(inputs[self.step.interference], mixtures)
        report("drawing")
        pictures = {
            "win_rates": draw_win_rates(results, work / "win_rates.png"),
            "radars": draw_radars(results, work / "radars.png"),
        }
        if any(cost["trainings"] for cost in results["costs"]):
            pictures["trainings"] = draw_trainings(results, work / "trainings.png")
        if results["fronts"]:
            pictures["fronts"] = draw_fronts(results, work / "fronts.png")
        parts = systems_report(results, pictures=pictures, samples=self._samples(graded))
        _write(work, results, as_markdown(parts), as_html(parts), _rows(graded))

    def _grader(self, prefix: str, inputs: Mapping[str, Path], report: Report) -> Grader:
        """Return the grader of a seed, whose reward models are its own."""
        from personalized_soups.evaluation.grading import Grader

        return Grader(self.world.catalogue, self._judge(prefix, inputs), self._gate(prefix, inputs, report))

    def _judge(self, prefix: str, inputs: Mapping[str, Path]) -> Judge | None:
        from personalized_soups.evaluation.grading import ScorerJudge
        from personalized_soups.evaluation.reward_judge import RewardJudge
        from personalized_soups.scoring.reward_models import RewardModels

        catalogue, trained = self.world.catalogue, self.step.reward_models
        if trained is None:
            return ScorerJudge(catalogue, self.step.judges) if self.step.judges else None
        folders: dict[str, Path | str] = {side: inputs[f"{prefix}{trained}-{side}"] / side for side in catalogue.sides}
        (reference,) = read_answers(inputs[f"{prefix}{self.step.systems[0]}"]).values()  # the base's
        judge = RewardJudge(catalogue, RewardModels(folders, device=self.world.device))
        return judge.centred_on(*reference)

    def _gate(self, prefix: str, inputs: Mapping[str, Path], report: Report) -> Gate | None:
        if self.step.fluency is None:
            return None
        from personalized_soups.scoring.fluency import FluencyGate
        from personalized_soups.scoring.fluency_calibration import calibrate_fluency
        from personalized_soups.studies.pipeline.kinds import ROLLOUTS
        from personalized_soups.training.rollouts import pool_lines

        report("calibrating the fluency gate")
        gate = FluencyGate.open(self.world.base, device=self.world.device)
        plain = [
            (sampled.prompt, answer)
            for sampled in pool_lines(inputs[f"{prefix}{self.step.fluency}"] / ROLLOUTS)
            for at, answer in enumerate(sampled.answers)
            if not sampled.instructions or sampled.instructions[at] is None
        ]
        measured = gate.measure([prompt for prompt, _ in plain], [answer for _, answer in plain])
        gate.bounds = calibrate_fluency(measured, accept=_ACCEPT)
        return gate

    def _graded(self, inputs: Mapping[str, Path], report: Report) -> tuple[GradedAnswers, Swept, Mixtures]:
        """Return the graded answers of all systems, all sweeps and the experts, with those of all seeds in a row.

        Only the judges and the gate of one seed are in memory at a time. Experts are checked with the first seed.
        """
        systems: dict[str, dict[Combination, list[Graded]]] = {
            system: {sides: [] for sides in self.combinations} for system in self.step.systems
        }
        swept: dict[str, dict[Shares, list[Graded]]] = {name: {} for name in self.sweeps}
        mixtures: dict[tuple[tuple[str, ...], float], list[Graded]] = {}
        for prefix in self.prefixes:
            grader = self._grader(prefix, inputs, report)
            for system, by_combination in systems.items():
                report(f"grading {prefix}{system}")
                answers = read_answers(inputs[f"{prefix}{system}"])
                found = {sides: grader.graded(*both) for sides, both in answers.items()}
                for sides in by_combination:
                    by_combination[sides] += found[sides if sides in found else ()]
            for name, by_shares in swept.items():
                report(f"grading {prefix}{name}")
                for shares, both in read_sweep(inputs[f"{prefix}{name}"]).items():
                    by_shares.setdefault(shares, []).extend(grader.graded(*both))
            if self.step.interference is not None and prefix == self.prefixes[0]:
                report("grading experts")
                folder = inputs[self.step.interference]
                mixtures = {key: grader.graded(*both) for key, both in read_interference(folder).items()}
        return systems, swept, mixtures

    def _has_cost(self, system: str) -> bool:
        trained, targets = self.trainings[system]
        return bool(trained) or not targets

    def _cost(self, system: str, inputs: Mapping[str, Path]) -> TrainingCost:
        """Return the cost of a system with the first seed."""
        trained, targets = self.trainings[system]
        folders = [inputs[f"{trained}-{target.name}"] for target in targets]
        return {
            "system": system,
            "trainings": len(targets),
            "grows": _grows(targets),
            "seconds": sum(map(recorded_seconds, folders)),
            "num_bytes": sum(path.stat().st_size for folder in folders for path in folder.rglob("*.safetensors")),
        }

    def _choices(self, inputs: Mapping[str, Path]) -> list[Choice]:
        """Return what was chosen for each system and seed. Systems of one choice with the same method are one entry."""
        found: dict[tuple[str, str, int], Choice] = {}
        for system, step in self.choices.items():
            for number, prefix in enumerate(self.prefixes):
                content = json.loads((inputs[f"{prefix}{step}"] / CHOICE).read_text(encoding="utf-8"))
                used = json.loads((inputs[f"{prefix}{system}"] / MIXING).read_text(encoding="utf-8"))
                choice: Choice = {
                    "systems": [],
                    "seed": self.world.seed + number,
                    "method": used["method"],
                    "weight": used["weight"],
                    "scores": content["scores"],
                }
                found.setdefault((step, used["method"], number), choice)["systems"].append(system)
        return list(found.values())

    def _add_fronts(self, results: SystemsResults, graded: GradedAnswers, swept: Swept, report: Report) -> None:
        from personalized_soups.evaluation.systems_fronts import MOST_OBJECTIVES, Mixture, fronts_of, reach_of

        num_seeds = len(self.prefixes)
        fronts, reach = [], []
        for name in self.step.fronts:
            report(f"the front of {name}")
            if name in swept:
                mixtures = [Mixture(dict(shares), entries) for shares, entries in swept[name].items()]
            else:
                mixtures = [Mixture(dict.fromkeys(sides, 1.0), entries) for sides, entries in graded[name].items()]
            fronts += fronts_of(name, mixtures, self.world.catalogue, num_seeds=num_seeds)
            if len(self.world.catalogue.dimensions) <= MOST_OBJECTIVES:
                reach.append(reach_of(name, mixtures, self.combinations, num_seeds=num_seeds))
        results["fronts"], results["reach"] = fronts, reach

    def _experts(self, folder: Path, mixtures: Mixtures) -> ExpertChecks:
        from personalized_soups.evaluation.expert_checks import check_alone, check_pairs

        doctor = json.loads((folder / FINDINGS).read_text(encoding="utf-8"))
        return {
            "weight": doctor["weight"],
            "alone": check_alone(mixtures, list(self.world.catalogue.sides), seed=self.world.seed),
            "pairs": check_pairs(mixtures, seed=self.world.seed),
            "findings": [
                {"severity": found["severity"], "what": found["what"], "mend": found["mend"]}
                for found in doctor["findings"]
            ],
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
    return {"side": "2n", "dimension": "n", "combination": "2^n", "single": "1"}[targets[0].kind] if targets else "0"


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
