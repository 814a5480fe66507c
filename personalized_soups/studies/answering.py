"""Answer the prompts of a study's stages. Answers are stored, so an interrupted stage is resumed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from personalized_soups.declare.profile import Profile
from personalized_soups.devices import resolve_device
from personalized_soups.scoring.fluency import MeasuredText
from personalized_soups.studies.costs import Costs
from personalized_soups.studies.folder import AnswerFile, StudyFolder
from personalized_soups.studies.study import Stage, Study
from personalized_soups.studies.workers import AnswerJob, AnswerTask, Workers, tasks_of

# A recipe's batch size is for a CPU. A GPU needs more rows to be busy.
_GPU_ROWS = 8


@dataclass(frozen=True, slots=True)
class Answering:
    """Answers prompts in worker processes.

    Attributes:
        study: the settings.
        folder: the paths of all files.
        stage: opens a progress bar.
        workers: the worker processes.
        costs: gets the memory of the workers.
        measured: what the fluency gate measured of each prompt and answer so far.
    """

    study: Study
    folder: StudyFolder
    stage: Stage
    workers: Workers
    costs: Costs
    measured: dict[tuple[str, str], MeasuredText] = field(default_factory=dict)

    def job(
        self,
        name: str,
        soup: Path | Profile | None,
        prompts: Sequence[str],
        *,
        seed: int,
        temperature: float | None = None,
        measured_as: Sequence[str] = (),
    ) -> AnswerJob:
        """Return a job with the study's settings. Without `temperature`, it has that of the recipe.

        If the recipe has a fluency gate, the answers are measured as answers to `measured_as`.
        """
        recipe = self.study.recipe
        return AnswerJob(
            name=name,
            base=str(self.study.base),
            soup=soup,
            experts=self.folder.experts,
            prompts=tuple(prompts),
            temperature=temperature or recipe.temperature,
            max_new_tokens=recipe.max_new_tokens,
            seed=seed,
            device=self.study.device,
            measured_as=() if recipe.fluency is None else tuple(measured_as),
        )

    def answered(self, title: str, stage: str, jobs: Sequence[AnswerJob]) -> dict[str, list[str]]:
        """Return the answers of each job. Stored answers are read, and the others are computed and stored."""
        file = self.folder.answers(stage)
        by_job = {name: answers for name, answers in file.read().items() if name in {job.name for job in jobs}}
        with self.stage(title, len(jobs)) as bar:
            bar.update(len(by_job))
            # A task runs as a whole if one of its jobs is missing: rounding depends on the batch, so a resumed run has
            # the same batches as a run without interruption.
            missing = [task for task in self._tasks(jobs) if any(job.name not in by_job for job in task.jobs)]
            for task, found in self.workers.run(missing):
                self.costs.saw(found.process, found.memory)
                for job, answers, measured in zip(task.jobs, found.answers, found.measured, strict=True):
                    if job.name not in by_job:
                        file.add(job.name, answers, measured)
                        by_job[job.name] = answers
                bar.update(len(by_job))
        self._store_measured(jobs, by_job, file)
        return by_job

    def _store_measured(self, jobs: Sequence[AnswerJob], answers: dict[str, list[str]], file: AnswerFile) -> None:
        measured = file.measured()
        for job in jobs:
            if job.measured_as:
                pairs = zip(job.measured_as, answers[job.name], strict=True)
                self.measured.update(zip(pairs, itertools.starmap(MeasuredText, measured[job.name]), strict=True))

    def _tasks(self, jobs: Sequence[AnswerJob]) -> list[AnswerTask]:
        size = self.study.recipe.batch_size
        if size is not None and resolve_device(self.study.device).type == "cuda":
            size *= _GPU_ROWS
        return tasks_of(jobs, size)
