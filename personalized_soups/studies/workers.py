"""Answering many prompts with many models, in worker processes.

Processes are spawned, not forked (torch's threads do not survive a fork), and share the machine's cores evenly.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.generation.generator import Generator
from personalized_soups.launching.interrupts import ctrl_c_ignored
from personalized_soups.merging.writing.adapter import merge


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """Prompts to be answered by one model.

    Args:
        name: the job's name within its stage.
        base: the base model.
        soup: None for the base alone, a merged adapter's folder, or a profile to merge (with `experts`).
        experts: the library's folder.
        prompts: what is asked.
        temperature, max_new_tokens, seed: how it is answered.
        device: where.
    """

    name: str
    base: str
    soup: Path | Profile | None
    experts: Path
    prompts: tuple[str, ...]
    temperature: float
    max_new_tokens: int
    seed: int
    device: str


class Workers:
    """A pool of worker processes."""

    def __init__(self, executor: ProcessPoolExecutor) -> None:
        self._executor = executor

    def answer(self, jobs: Sequence[AnswerJob]) -> Iterator[tuple[AnswerJob, list[str]]]:
        """Yield each job with its answers, as they are done; the first fault ends it."""
        with ctrl_c_ignored():  # a process may start with any job
            futures = {self._executor.submit(_answer, job): job for job in jobs}
        pending = set(futures)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            for future in done:
                yield futures[future], future.result()


@contextmanager
def start_workers(count: int) -> Iterator[Workers]:
    """Start `count` worker processes and end them with the block; Ctrl-C ends them at once."""
    context = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, context, initializer=_begin, initargs=(count,))
    try:
        yield Workers(executor)
    except BaseException:
        # Without their processes the executor marks all jobs as broken and ends; cancelled ones it would trip over.
        for process in list(getattr(executor, "_processes", {}).values()):
            process.terminate()
        raise
    finally:
        executor.shutdown()


def _begin(count: int) -> None:
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))


def _answer(job: AnswerJob) -> list[str]:
    if isinstance(job.soup, Profile):
        with tempfile.TemporaryDirectory() as scratch:
            folder = merge(_library(job.experts), job.soup).write(Path(scratch) / "soup")
            return _said(Generator.open(job.base, folder, device=job.device), job)
    return _said(Generator.open(job.base, job.soup, device=job.device), job)


def _said(generator: Generator, job: AnswerJob) -> list[str]:
    answers = generator.answers(
        job.prompts,
        temperature=job.temperature,
        max_new_tokens=job.max_new_tokens,
        batch_size=len(job.prompts),
        seed=job.seed,
    )
    return [said for (said,) in answers]


@cache
def _library(folder: Path) -> ExpertLibrary:
    return ExpertLibrary.open(folder)
