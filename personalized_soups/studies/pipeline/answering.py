"""The step that answers held-out prompts with one system, for each combination of sides."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.declare.profile import Profile
from personalized_soups.declare.run_steps import AnswersStep
from personalized_soups.files.lines import growing_lines
from personalized_soups.studies.pipeline.answer_lines import ANSWERS, Answered, grouped_answers
from personalized_soups.studies.pipeline.mixing import Mixing
from personalized_soups.studies.pipeline.prompts import prompts_of
from personalized_soups.studies.pipeline.steps import Report
from personalized_soups.studies.pipeline.targets import combination_name
from personalized_soups.studies.pipeline.world import World

if TYPE_CHECKING:
    from personalized_soups.generation.prompts import Prompt
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.scoring.scorers import Scorer

Combination: TypeAlias = tuple[str, ...]

MIXING = "mixing.json"


@dataclass(frozen=True, slots=True)
class Source:
    """What answers, beside the base.

    Attributes:
        folders: the folders of adapters.
        models: the name of the adapter for each combination. It is empty if the adapters are mixed.
        mixing: how adapters are mixed by the method linear.
        weight: the weight of a mixed adapter.
    """

    folders: tuple[Path, ...]
    models: Mapping[Combination, str]
    mixing: Mixing | None = None
    weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """Answers prompts with one system.

    Attributes:
        world: what all steps share.
        step: the declared step.
        prompts: the file of prompts.
        combinations: the combinations of sides.
        models: the name of the model that answers for each combination. It is empty for the base and for mixed experts.
        mixing: how experts are mixed. None for the base and for models.
    """

    world: World
    step: AnswersStep
    prompts: Path
    combinations: tuple[Combination, ...]
    models: Mapping[Combination, str]
    mixing: Mixing | None = None

    def __call__(self, work: Path, inputs: Mapping[str, Path], report: Report) -> None:
        """Write answers.jsonl, and mixing.json with the method and the weight of mixed experts."""
        if self.mixing is None:
            self._write(work, Source(tuple(inputs.values()), self.models), report)
            return
        method, weight = self.mixing.resolved(inputs)
        experts = tuple(self.mixing.expert_folders(inputs))
        (work / MIXING).write_text(json.dumps({"method": method, "weight": weight}) + "\n", encoding="utf-8")
        if method == "linear":
            self._write(work, Source(experts, {}, self.mixing, weight), report)
            return
        with tempfile.TemporaryDirectory() as scratch:
            self._write(work, self._merged(self.mixing, method, weight, experts, Path(scratch)), report)

    def _merged(self, mixing: Mixing, method: str, weight: float, experts: Sequence[Path], scratch: Path) -> Source:
        """Return the merged adapters of all combinations."""
        from personalized_soups.adapters.library import ExpertLibrary
        from personalized_soups.merging.writing.adapter import merge

        library = ExpertLibrary.open(*experts)
        models = {sides: f"{method}-{combination_name(sides)}" for sides in self.combinations}
        folders = []
        for sides, name in models.items():
            profile = mixing.profile(dict.fromkeys(sides, 1.0), method, weight)
            assert profile is not None  # the weight is not 0, and each side has a whole share
            folders.append(merge(library, profile).write(scratch / name))
        return Source(tuple(folders), models)

    def _write(self, work: Path, source: Source, report: Report) -> None:
        from personalized_soups.scoring.mean_scorer import MeanScorer

        prompts = prompts_of(self.prompts, self.step)
        # One job has all rows of an answer, or of the candidates for all combinations.
        jobs = [(sides, at) for sides in self._asked for at in range(len(prompts))]
        size = max(1, self.step.batch_size // self._rows_per_job)
        lines_per_job = len(self._graded_for(self._asked[0]))
        scorers = {sides: MeanScorer(self.world.catalogue, sides) for sides in self._chosen_for}
        model: SoupModel | None = None
        with growing_lines(work / ANSWERS, {}, overwrite=True) as lines:
            # A batch that was begun is answered as a whole again: rounding depends on the batch.
            start = lines.num_done // (size * lines_per_job) * size
            for first in range(start, len(jobs), size):
                model = model or self.world.soup_model(source.folders)
                rows = self._answered(model, source, prompts, jobs[first : first + size], scorers)
                lines.add(rows[max(0, lines.num_done - first * lines_per_job) :])
                report(f"{min(first + size, len(jobs))}/{len(jobs)} answers")

    @property
    def extent(self) -> str:
        """How many answers are generated, in words."""
        jobs = len(self._asked) * len(prompts_of(self.prompts, self.step))
        return f"{jobs * self.step.num_candidates} answers"

    @property
    def _asked(self) -> tuple[Combination, ...]:
        """The combinations whose answers differ. If nothing differs, there is one entry without sides."""
        has_own_rows = self.step.prompted or self.step.experts is not None or len(set(self.models.values())) > 1
        return self.combinations if has_own_rows else ((),)

    @property
    def _chosen_for(self) -> tuple[Combination, ...]:
        """The combinations for which the best candidate is chosen."""
        return self.combinations if self.step.num_candidates > 1 else ()

    @property
    def _rows_per_job(self) -> int:
        return len(self.combinations[0]) if self.step.mixing == "log_probs" else self.step.num_candidates

    def _graded_for(self, sides: Combination) -> tuple[Combination, ...]:
        """Return the combinations for which a job gives an answer each: all if only the choice differs."""
        return (sides,) if sides else self._chosen_for or (sides,)

    def _answered(
        self,
        model: SoupModel,
        source: Source,
        prompts: Sequence[str],
        jobs: Sequence[tuple[Combination, int]],
        scorers: Mapping[Combination, Scorer],
    ) -> list[dict[str, Any]]:
        """Return the lines of some jobs."""
        from personalized_soups.generation.prompts import with_text_before

        asked: list[Prompt] = []
        profiles: list[ProfileLike] = []
        places: list[int] = []
        for sides, at in jobs:
            prompt = prompts[at]
            text = self.world.catalogue.instructions(sides) if self.step.prompted else ""
            rows = self._profiles(source, sides)
            asked += [with_text_before(prompt, text)] * len(rows)
            profiles += rows
            places += self._places(at, len(rows))
        sampling: dict[str, Any] = {}
        if self.step.mixing == "log_probs":
            sampling["log_prob_weights"] = [source.weight] * len(asked)
        answers = model.generate(
            asked,
            profiles,
            max_new_tokens=self.step.max_new_tokens,
            temperature=self.step.temperature,
            seed=self.world.answer_seed,
            batch_size=len(asked),
            places=places,
            **sampling,
        )
        per_job = self._rows_per_job
        return [
            {
                "prompt": prompts[at],
                "sides": list(wanted),
                "answer": self._best(prompts[at], candidates, scorers.get(wanted)),
            }
            for number, (sides, at) in enumerate(jobs)
            for candidates in (answers[number * per_job : (number + 1) * per_job],)
            for wanted in self._graded_for(sides)
        ]

    def _profiles(self, source: Source, sides: Combination) -> list[ProfileLike]:
        """Return the profile of each row of a job."""
        if self.step.mixing == "log_probs":
            return [Profile(weights={side: 1.0}) for side in sides]
        profile: ProfileLike = None
        if source.mixing is not None:
            profile = source.mixing.profile(dict.fromkeys(sides, 1.0), "linear", source.weight)
        elif source.models:
            profile = Profile(weights={source.models[sides or self.combinations[0]]: 1.0})
        return [profile] * self.step.num_candidates

    def _places(self, at: int, count: int) -> list[int]:
        """Return the places of a job's rows: different ones for candidates, which need different random numbers."""
        if self.step.mixing == "log_probs":
            return [at] * count
        return [at * self.step.num_candidates + candidate for candidate in range(count)]

    @staticmethod
    def _best(prompt: str, candidates: Sequence[str], scorer: Scorer | None) -> str:
        """Return the candidate with the best score: the first of equals. Without a scorer, return the first."""
        if scorer is None:
            return candidates[0]
        return max(candidates, key=lambda answer: scorer(prompt, answer).toward("high"))


def read_answers(folder: Path) -> dict[Combination, Answered]:
    """Return the prompts and the answers for each combination. The key () has answers for all combinations."""
    return grouped_answers(folder, lambda line: tuple(line["sides"]))
