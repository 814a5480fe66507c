"""Train several experts in a few processes. Each process trains one expert after the other.

Experts are independent. On a CPU, two processes with one thread each train a small model faster than one process with
two threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.launching.processes import Report, start_processes
from personalized_soups.training.expert import train_expert
from personalized_soups.training.progress import Silent, StepReport, TrainingProgress


@dataclass(frozen=True, slots=True)
class ExpertJob:
    """One expert to train.

    Attributes:
        side: the side to train for.
        data: the file of preference pairs.
        out: the expert's folder.
    """

    side: str
    data: Path
    out: Path


def train_experts(
    jobs: Sequence[ExpertJob],
    *,
    base: str | Path,
    on: str | Path | None = None,
    recipe: TrainingRecipe,
    catalogue: Catalogue | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    workers: int = 1,
    progress: TrainingProgress | None = None,
) -> list[Path]:
    """Train all experts of `jobs` with one recipe on one base, and return their folders in the order of `jobs`.

    Args:
        jobs: the experts to train.
        workers: the number of processes. With 1, this process trains. With more, each process computes with one thread,
            and a script that calls this function needs `if __name__ == "__main__":`.
        base, on, recipe, catalogue, device, seed, resume, progress: as for `train_expert`.

    Raises:
        SoupError: if a training fails. The other trainings are stopped and can be resumed.
    """
    options: dict[str, Any] = {"base": base, "on": on, "recipe": recipe, "catalogue": catalogue}
    options |= {"device": device, "seed": seed, "resume": resume}
    progress = progress or Silent()
    if workers <= 1 or len(jobs) <= 1:
        return [_train(job, progress, options) for job in jobs]
    with start_processes(partial(_train_and_report, options=options), workers, num_threads=1) as pool:
        for _ in pool.run(jobs, partial(_forward, progress)):
            pass
    return [job.out for job in jobs]


def _train(job: ExpertJob, progress: TrainingProgress, options: dict[str, Any]) -> Path:
    return train_expert(job.side, data=job.data, out=job.out, progress=progress, **options)


def _train_and_report(job: ExpertJob, report: Report, *, options: dict[str, Any]) -> None:
    _train(job, _ReportingProgress(report), options)


class _ReportingProgress:
    """A TrainingProgress that sends its calls to the main process, where `_forward` repeats them."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        self._report(("begin", (side,), {"step": step, "num_steps": num_steps}))

    def advance(self, side: str, report: StepReport) -> None:
        self._report(("advance", (side, report), {}))

    def note(self, side: str, text: str) -> None:
        self._report(("note", (side, text), {}))

    def end(self, side: str) -> None:
        self._report(("end", (side,), {}))


def _forward(progress: TrainingProgress, call: tuple[str, tuple[Any, ...], dict[str, Any]]) -> None:
    method, positional, named = call
    getattr(progress, method)(*positional, **named)
