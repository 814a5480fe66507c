"""Training several experts, one after another in each of a few processes.

Experts are independent, and on a CPU two processes of one thread train a small model faster than one of two threads.
"""

from __future__ import annotations

import multiprocessing
import os
import queue
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any, NoReturn

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import RunError, SoupError
from personalized_soups.launching.interrupts import ctrl_c_ignored
from personalized_soups.training.expert import train_expert
from personalized_soups.training.progress import Silent, StepReport, TrainingProgress

_SECONDS_TO_STOP = 10.0


@dataclass(frozen=True, slots=True)
class ExpertJob:
    """One expert to train: its side, its pairs, its folder."""

    side: str
    data: Path
    out: Path


def train_experts(
    jobs: Sequence[ExpertJob],
    *,
    base: str | Path,
    recipe: TrainingRecipe,
    catalogue: Catalogue | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    workers: int = 1,
    progress: TrainingProgress | None = None,
) -> list[Path]:
    """Train every expert of `jobs` with one recipe on one base, and return their folders in the order of `jobs`.

    Args:
        jobs: what to train.
        workers: processes to train in; 1 trains in this one. With more, each computes with one thread, and a script
            that calls this needs its `if __name__ == "__main__":`.
        base, recipe, catalogue, device, seed, resume, progress: as for `train_expert`.

    Raises:
        SoupError: the first that any expert meets; the others' trainings are stopped and can be resumed.
    """
    options = {"base": base, "recipe": recipe, "catalogue": catalogue, "device": device, "seed": seed, "resume": resume}
    progress = progress or Silent()
    if workers <= 1 or len(jobs) <= 1:
        return [
            train_expert(job.side, data=job.data, out=job.out, progress=progress, **options)  # type: ignore[arg-type]
            for job in jobs
        ]
    context = multiprocessing.get_context("spawn")
    waiting: Any = context.Queue()
    told: Any = context.Queue()
    num_workers = min(workers, len(jobs))
    for job in [*jobs, *[None] * num_workers]:
        waiting.put(job)
    processes = [context.Process(target=_work, args=(waiting, told, options), daemon=True) for _ in range(num_workers)]
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the workers when they import torch
    try:
        with ctrl_c_ignored():
            for process in processes:
                process.start()
    finally:
        _restore("OMP_NUM_THREADS", threads)
    try:
        _listen(told, processes, num_jobs=len(jobs), progress=progress)
    finally:
        _stop(processes)
    return [job.out for job in jobs]


class _Telling:
    """A TrainingProgress that sends what it hears to the process that listens."""

    def __init__(self, told: Any) -> None:
        self._told = told

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        self._told.put(("begin", side, {"step": step, "num_steps": num_steps}))

    def advance(self, side: str, report: StepReport) -> None:
        self._told.put(("advance", side, {"report": report}))

    def note(self, side: str, text: str) -> None:
        self._told.put(("note", side, {"text": text}))

    def end(self, side: str) -> None:
        self._told.put(("end", side, {}))


def _work(waiting: Any, told: Any, options: dict[str, Any]) -> None:
    """Train what is waiting until nothing is; runs in a process of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as inherited, unless a thread started this process
    signal.signal(signal.SIGTERM, _leave)
    while (job := waiting.get()) is not None:
        try:
            train_expert(job.side, data=job.data, out=job.out, progress=_Telling(told), **options)
        except SoupError as error:
            told.put(("failed", job.side, {"error": error}))
            return
        told.put(("done", job.side, {}))


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _listen(told: Any, processes: Sequence[SpawnProcess], *, num_jobs: int, progress: TrainingProgress) -> None:
    num_done = 0
    while num_done < num_jobs:
        try:
            kind, side, said = told.get(timeout=0.5)
        except queue.Empty:
            _check_alive(processes)
            continue
        if kind == "failed":
            raise said["error"]
        if kind == "done":
            num_done += 1
        elif kind == "advance":
            progress.advance(side, said["report"])
        elif kind == "begin":
            progress.begin(side, **said)
        elif kind == "note":
            progress.note(side, said["text"])
        else:
            progress.end(side)


def _check_alive(processes: Sequence[SpawnProcess]) -> None:
    for process in processes:
        if process.exitcode not in {None, 0}:
            raise RunError(
                f"a training process ended with exit code {process.exitcode}",
                where=f"process {process.pid}",
                mend="see its message above; where there is none, memory may have run out: train with fewer workers, "
                "and resume",
            )


def _stop(processes: Sequence[SpawnProcess]) -> None:
    """End the processes that still run; each leaves its last whole checkpoint behind."""
    for process in processes:
        if process.exitcode is None and process.pid is not None:
            process.join(timeout=0.2)
            process.terminate()
    for process in processes:
        process.join(timeout=_SECONDS_TO_STOP)
        if process.exitcode is None:
            process.kill()


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
