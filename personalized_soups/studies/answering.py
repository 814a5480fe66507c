"""Answer the prompts of a study's stages. Answers are stored, so an interrupted stage is resumed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from personalized_soups.declare.profile import Profile
from personalized_soups.devices import resolve_device
from personalized_soups.studies.costs import Costs
from personalized_soups.studies.folder import StudyFolder
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
    """

    study: Study
    folder: StudyFolder
    stage: Stage
    workers: Workers
    costs: Costs

    def job(
        self,
        name: str,
        soup: Path | Profile | None,
        prompts: Sequence[str],
        *,
        seed: int,
        temperature: float | None = None,
    ) -> AnswerJob:
        """Return a job with the study's settings. Without `temperature`, it has that of the recipe."""
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
                for job, answers in zip(task.jobs, found.answers, strict=True):
                    if job.name not in by_job:
                        file.add(job.name, answers)
                        by_job[job.name] = answers
                bar.update(len(by_job))
        return by_job

    def _tasks(self, jobs: Sequence[AnswerJob]) -> list[AnswerTask]:
        size = self.study.recipe.batch_size
        if size is not None and resolve_device(self.study.device).type == "cuda":
            size *= _GPU_ROWS
        return tasks_of(jobs, size)
