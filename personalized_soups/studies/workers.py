"""Answer many prompts with many models in worker processes."""

from __future__ import annotations

import os
import tempfile
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TypeAlias

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.generation.generator import Generator
from personalized_soups.launching.processes import ProcessPool, Report, start_processes
from personalized_soups.merging.writing.adapter import merge


@dataclass(frozen=True, slots=True)
class AnswerJob:
    """The prompts that one model has to answer.

    Args:
        name: the job's name, unique within its stage.
        base: the base model's folder.
        soup: the folder of a merged adapter, or a profile for merging experts. None answers with the base alone.
        experts: the folder of the experts that a profile names.
        prompts: the prompts to answer.
        temperature, max_new_tokens, seed: as for `Generator.answers`.
        device: the device to compute on.
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


Workers: TypeAlias = ProcessPool[AnswerJob, list[str]]


def start_workers(count: int) -> AbstractContextManager[Workers]:
    """Return a pool of `count` worker processes as a context manager, whose end stops them.

    The workers share the machine's cores evenly.
    """
    return start_processes(_answer, count, num_threads=max(1, (os.cpu_count() or 1) // count))


def _answer(job: AnswerJob, _: Report) -> list[str]:
    if isinstance(job.soup, Profile):
        with tempfile.TemporaryDirectory() as scratch:
            folder = merge(_library(job.experts), job.soup).write(Path(scratch) / "soup")
            return _answers(Generator.open(job.base, folder, device=job.device), job)
    return _answers(Generator.open(job.base, job.soup, device=job.device), job)


def _answers(generator: Generator, job: AnswerJob) -> list[str]:
    answers = generator.answers(
        job.prompts,
        temperature=job.temperature,
        max_new_tokens=job.max_new_tokens,
        batch_size=len(job.prompts),
        seed=job.seed,
    )
    return [answer for (answer,) in answers]


@cache
def _library(folder: Path) -> ExpertLibrary:
    return ExpertLibrary.open(folder)
