"""The steps that answer prompts along the way between two sides, and with experts alone and in pairs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from personalized_soups.declare.run_steps import InterferenceStep, SweepStep
from personalized_soups.studies.pipeline.answer_lines import ANSWERS, Answered, grouped_answers
from personalized_soups.studies.pipeline.mixing import Mixing, shares_between
from personalized_soups.studies.pipeline.prompts import prompts_of
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.world import World

Shares: TypeAlias = tuple[tuple[str, float], ...]
"""The sides of a mixture and their shares."""

FINDINGS = "findings.json"


@dataclass(frozen=True, slots=True)
class SweepSides:
    """Answers prompts while the weight moves from one side to another.

    Attributes:
        world: what all steps share.
        step: the declared step.
        prompts: the file of prompts.
        combinations: the combinations of sides.
        mixing: how the experts are mixed.
    """

    world: World
    step: SweepStep
    prompts: Path
    combinations: tuple[tuple[str, ...], ...]
    mixing: Mixing

    @property
    def extent(self) -> str:
        """How many answers are generated, in words."""
        mixtures = shares_between(self.world.catalogue, self.combinations, self.step.num_steps)
        return f"{len(mixtures) * len(prompts_of(self.prompts, self.step))} answers"

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write answers.jsonl. Each line has the share of each side."""
        from personalized_soups.studies.pipeline.mixtures import Mixture, answer_mixtures

        _, weight = self.mixing.resolved(inputs)
        mixtures = shares_between(self.world.catalogue, self.combinations, self.step.num_steps)
        answer_mixtures(
            work / ANSWERS,
            [Mixture({"shares": shares}, self.mixing.profile(shares, "linear", weight)) for shares in mixtures],
            prompts_of(self.prompts, self.step),
            world=self.world,
            step=self.step,
            experts=self.mixing.expert_folders(inputs),
            seed=self.world.answer_seed,
            report=report,
        )


@dataclass(frozen=True, slots=True)
class MeasureInterference:
    """Answers prompts with each expert alone and with each pair of experts of two dimensions, and runs the doctor.

    Attributes:
        world: what all steps share.
        step: the declared step.
        prompts: the file of prompts.
        mixing: how the experts are mixed.
    """

    world: World
    step: InterferenceStep
    prompts: Path
    mixing: Mixing

    @property
    def extent(self) -> str:
        """How many answers are generated, in words."""
        mixtures = 1 + 2 * len(self.world.catalogue.sides) + len(self._pairs())
        return f"{mixtures * len(prompts_of(self.prompts, self.step))} answers"

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write answers.jsonl and findings.json. A line of the base has no sides."""
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.merging.doctor.diagnose import diagnose
        from personalized_soups.studies.pipeline.mixtures import Mixture, answer_mixtures

        _, weight = self.mixing.resolved(inputs)
        folders = self.mixing.expert_folders(inputs)
        mixtures: list[tuple[tuple[str, ...], float]] = [((), 0.0)]
        mixtures += [((side,), each) for side in self.world.catalogue.sides for each in dict.fromkeys((1.0, weight))]
        mixtures += [(pair, weight) for pair in self._pairs()]
        answer_mixtures(
            work / ANSWERS,
            [
                Mixture(
                    {"sides": list(sides), "weight": each},
                    self.mixing.profile(dict.fromkeys(sides, 1.0), "linear", each) if sides else None,
                )
                for sides, each in mixtures
            ],
            prompts_of(self.prompts, self.step),
            world=self.world,
            step=self.step,
            experts=folders,
            seed=self.world.answer_seed,
            report=report,
        )
        found = diagnose(ExpertLibrary.open(*folders), self.world.base)
        findings = {"weight": weight, "findings": [asdict(finding) for finding in found.findings]}
        (work / FINDINGS).write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")

    def _pairs(self) -> list[tuple[str, str]]:
        """Return all pairs of sides of two dimensions."""
        dimension_of = self.world.catalogue.dimension_of
        return [
            (one, other)
            for one, other in itertools.combinations(self.world.catalogue.sides, 2)
            if dimension_of(one) != dimension_of(other)
        ]


def read_sweep(folder: Path) -> dict[Shares, Answered]:
    """Return the prompts and the answers of each mixture."""
    return grouped_answers(
        folder, lambda line: tuple(sorted((side, share) for side, share in line["shares"].items() if share))
    )


def read_interference(folder: Path) -> dict[tuple[tuple[str, ...], float], Answered]:
    """Return the prompts and the answers of each mixture: its sides and their weight. The base is `((), 0.0)`."""
    return grouped_answers(folder, lambda line: (tuple(line["sides"]), line["weight"]))
