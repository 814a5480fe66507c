"""The step that chooses the merge method and the weight of experts on validation prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.declare.run_steps import ChooseStep
from personalized_soups.studies.pipeline.answer_lines import ANSWERS, grouped_answers
from personalized_soups.studies.pipeline.mixing import CHOICE, Mixing
from personalized_soups.studies.pipeline.prompts import prompts_of
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.world import World

_SEED = 2000


@dataclass(frozen=True, slots=True)
class Choose:
    """Chooses by the joint score: the share of valid answers on the wanted side of every dimension.

    Attributes:
        world: what all steps share.
        step: the declared step.
        prompts: the file of validation prompts.
        combinations: the combinations of sides.
        mixing: how the experts are mixed.
    """

    world: World
    step: ChooseStep
    prompts: Path
    combinations: tuple[tuple[str, ...], ...]
    mixing: Mixing

    @property
    def _trials(self) -> list[tuple[str, float]]:
        return [(method, weight) for method, weights in self.step.weights.items() for weight in weights]

    @property
    def extent(self) -> str:
        """How many answers are generated, in words."""
        prompts = prompts_of(self.prompts, self.step)
        return f"{len(self._trials) * len(self.combinations) * len(prompts)} answers"

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write choice.json: the best method, the best weight of each method, and all scores."""
        from personalized_soups.evaluation.grading import Grader
        from personalized_soups.studies.outcome import best_of_method, best_weight, score_selection
        from personalized_soups.studies.pipeline.mixtures import Mixture, answer_mixtures

        trials = self._trials
        rows = [
            Mixture(
                {"method": method, "weight": weight, "sides": list(sides)},
                self.mixing.profile(dict.fromkeys(sides, 1.0), method, weight),
            )
            for method, weight in trials
            for sides in self.combinations
        ]
        answer_mixtures(
            work / ANSWERS,
            rows,
            prompts_of(self.prompts, self.step),
            world=self.world,
            step=self.step,
            experts=list(inputs.values()),
            seed=_SEED + self.world.seed,
            report=report,
        )
        grader = Grader(self.world.catalogue)
        found = grouped_answers(work, lambda line: (line["method"], line["weight"], tuple(line["sides"])))
        scores = [
            score_selection(
                method, weight, {sides: grader.graded(*found[method, weight, sides]) for sides in self.combinations}
            )
            for method, weight in trials
        ]
        choice = {
            "method": best_of_method(scores),
            "weights": {method: best_weight(scores, method) for method in self.step.weights},
            "scores": scores,
        }
        (work / CHOICE).write_text(json.dumps(choice, indent=1) + "\n", encoding="utf-8")
