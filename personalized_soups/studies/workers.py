"""Answer many prompts with many models in worker processes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.profile import Profile
from personalized_soups.generation.generator import Generator
from personalized_soups.launching.processes import ProcessPool, Report, start_processes
from personalized_soups.merging.writing.adapter import merge
from personalized_soups.scoring.fluency import FluencyGate, MeasuredText
from personalized_soups.studies.costs import largest_memory

if TYPE_CHECKING:
    from personalized_soups.mixing.model import SoupModel
    from personalized_soups.mixing.personal_model import PersonalModel


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
        measured_as: for each prompt, the prompt with which the fluency of its answer is measured: without instructions.
            Without these, nothing is measured.
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
    measured_as: tuple[str, ...] = ()

    @property
    def sampling(self) -> tuple[float, int, int]:
        """Temperature, number of new tokens and seed. Jobs share a batch only if these are equal."""
        return self.temperature, self.max_new_tokens, self.seed


@dataclass(frozen=True, slots=True)
class AnswerTask:
    """Jobs that a worker answers at once.

    Args:
        jobs: jobs with the same sampling. There is only one if `batch_size` is None.
        batch_size: the number of answers that are generated at once, each with its own mixture. With None, the job's
            model is merged into the base, and answers all its prompts at once.
    """

    jobs: tuple[AnswerJob, ...]
    batch_size: int | None


@dataclass(frozen=True, slots=True)
class TaskAnswers:
    """The answers of each job of a task, and what was measured of them.

    Args:
        answers: the answers of each job.
        measured: what the fluency gate measures of each answer. It is empty for a job without `measured_as`.
        process: the id of the process that computed them.
        memory: the largest memory in bytes that this process had so far.
    """

    answers: tuple[list[str], ...]
    measured: tuple[list[MeasuredText], ...]
    process: int
    memory: int


Workers: TypeAlias = ProcessPool[AnswerTask, TaskAnswers]


def start_workers(count: int) -> AbstractContextManager[Workers]:
    """Return a pool of `count` worker processes as a context manager, whose end stops them.

    The workers share the machine's cores evenly.
    """
    return start_processes(_answer, count, num_threads=max(1, (os.cpu_count() or 1) // count))


def tasks_of(jobs: Sequence[AnswerJob], batch_size: int | None) -> list[AnswerTask]:
    """Return the tasks that answer all jobs. A task has as many consecutive jobs as fit into one batch.

    A job with more prompts than `batch_size` is a task of its own, which takes several batches.
    """
    if batch_size is None:
        return [AnswerTask((job,), None) for job in jobs]
    groups: list[list[AnswerJob]] = []
    for job in jobs:
        rows = sum(len(each.prompts) for each in groups[-1]) if groups else batch_size
        if groups and rows + len(job.prompts) <= batch_size and job.sampling == groups[-1][0].sampling:
            groups[-1].append(job)
        else:
            groups.append([job])
    return [AnswerTask(tuple(group), batch_size) for group in groups]


def _answer(task: AnswerTask, _: Report) -> TaskAnswers:
    if task.batch_size is None:
        answers = [_merged_answers(job) for job in task.jobs]
    else:
        answers = _mixed_answers(task.jobs, task.batch_size)
    measured = tuple(_measured(job, texts) for job, texts in zip(task.jobs, answers, strict=True))
    return TaskAnswers(tuple(answers), measured, os.getpid(), largest_memory())


def _measured(job: AnswerJob, answers: Sequence[str]) -> list[MeasuredText]:
    if not job.measured_as:
        return []
    return FluencyGate(_base(job.base, job.device), base=job.base).measure(job.measured_as, answers)


def _merged_answers(job: AnswerJob) -> list[str]:
    """Answer all prompts of a job at once, with a model whose weights contain the soup."""
    if isinstance(job.soup, Profile):
        with tempfile.TemporaryDirectory() as scratch:
            folder = merge(_library(job.experts), job.soup).write(Path(scratch) / "soup")
            return _answers(Generator.open(job.base, folder, device=job.device), [job], len(job.prompts))
    return _answers(Generator.open(job.base, job.soup, device=job.device), [job], len(job.prompts))


def _mixed_answers(jobs: Sequence[AnswerJob], batch_size: int) -> list[list[str]]:
    """Answer the prompts of all jobs, with rows of different models in a batch.

    The mixture of a row is exact for the method linear. The soup of another method is one adapter more.
    """
    first = jobs[0]
    if all(job.soup is None for job in jobs):
        return list(_by_job(jobs, _answers(_base(first.base, first.device), jobs, batch_size)))
    from personalized_soups.mixing.personal_answers import answer

    with tempfile.TemporaryDirectory() as scratch:
        models = [_personal_model(job, Path(scratch) / str(number)) for number, job in enumerate(jobs)]
        texts = answer(
            _soup_model(first.base, first.device, first.experts),
            [prompt for job in jobs for prompt in job.prompts],
            [model for job, model in zip(jobs, models, strict=True) for _ in job.prompts],
            max_new_tokens=first.max_new_tokens,
            temperature=first.temperature,
            seed=first.seed,
            batch_size=batch_size,
            places=_places(jobs),
        )
    return list(_by_job(jobs, texts))


def _personal_model(job: AnswerJob, scratch: Path) -> PersonalModel:
    from personalized_soups.mixing.personal_model import PersonalModel

    if isinstance(job.soup, Profile):
        if job.soup.method == "linear":
            return PersonalModel(profile=job.soup)
        return PersonalModel(adapter=merge(_library(job.experts), job.soup).write(scratch))
    return PersonalModel(adapter=job.soup)


def _answers(generator: Generator, jobs: Sequence[AnswerJob], batch_size: int) -> list[str]:
    temperature, max_new_tokens, seed = jobs[0].sampling
    answers = generator.answers(
        [prompt for job in jobs for prompt in job.prompts],
        temperature=temperature,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        seed=seed,
        places=_places(jobs),
    )
    return [answer for (answer,) in answers]


def _places(jobs: Sequence[AnswerJob]) -> list[int]:
    """Return each prompt's place in its job: all models draw the same random numbers for the same prompt."""
    return [place for job in jobs for place in range(len(job.prompts))]


def _by_job(jobs: Sequence[AnswerJob], texts: Sequence[str]) -> Iterator[list[str]]:
    start = 0
    for job in jobs:
        yield list(texts[start : start + len(job.prompts)])
        start += len(job.prompts)


@cache
def _library(folder: Path) -> ExpertLibrary:
    return ExpertLibrary.open(folder)


@cache
def _base(base: str, device: str) -> Generator:
    return Generator.open(base, device=device)


@cache
def _soup_model(base: str, device: str, experts: Path) -> SoupModel:
    """Return the model with all experts. It holds the weights of `_base`, which stays the base alone."""
    from personalized_soups.mixing.model import SoupModel

    generator = _base(base, device)
    return SoupModel(generator.model, experts, tokenizer=generator.tokenizer, base=base)
