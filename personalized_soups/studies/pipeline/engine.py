"""Run the steps of a run folder: those that are missing, and those on which something has changed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from personalized_soups.launching.processes import Report, start_processes
from personalized_soups.studies.pipeline.run_folder import RunFolder, StepRecord
from personalized_soups.studies.pipeline.steps import Step, in_order

State: TypeAlias = Literal["done", "run", "maybe"]
"""What a run would do with a step: nothing; run it; or run it if a step that it needs gives other files than before."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """A step and what a run would do with it.

    Attributes:
        step: the step.
        state: what a run would do.
        seconds: how long the step took last time, if it was run before.
    """

    step: Step
    state: State
    seconds: float | None


@dataclass(frozen=True, slots=True)
class FinishedStep:
    """A step that a run has finished.

    Attributes:
        name: the step's name.
        num_done: the number of finished steps, including this one and those that were not run.
        num_steps: the number of all steps.
        record: what was recorded.
        was_run: whether the step was run. Otherwise its files were there.
    """

    name: str
    num_done: int
    num_steps: int
    record: StepRecord
    was_run: bool


@dataclass(frozen=True, slots=True)
class _Task:
    step: Step
    work: Path
    inputs: Mapping[str, Path]


def plan(steps: Sequence[Step], folder: RunFolder) -> list[PlannedStep]:
    """Return what a run would do, in the order in which it would do it. Nothing is written.

    Raises:
        DeclarationError: as `in_order` does.
        FileFormatError: if the manifest is damaged.
    """
    records = folder.read()
    states: dict[str, State] = {}
    planned = []
    for step in in_order(steps):
        record = records.get(step.name)
        state: State
        if all(states[name] == "done" for name in step.needs):
            key = step.key({name: records[name].output for name in step.needs})
            is_done = record is not None and record.key == key and folder.files(step.name).is_dir()
            state = "done" if is_done else "run"
        else:  # the new files of a need, and with them this step's key, are not known
            state = "run" if record is None else "maybe"
        states[step.name] = state
        planned.append(PlannedStep(step, state, None if record is None else record.seconds))
    return planned


def run_steps(
    steps: Sequence[Step],
    folder: RunFolder,
    *,
    workers: int = 1,
    on_report: Callable[[str, Any], None] | None = None,
) -> Iterator[FinishedStep]:
    """Run the steps that are missing or changed, and yield each step when its files are there.

    Args:
        steps: all steps of the run.
        folder: the folder of the run.
        workers: the number of processes. With 1, this process runs the steps.
        on_report: called with the name of a step and each of its progress reports.

    Raises:
        DeclarationError: as `in_order` does.
        OutputExistsError: if another run holds the folder, or it is that of something else.
        SoupError: if a step fails. The files of finished steps stay, and a rerun continues in the files of the step.
    """
    ordered = in_order(steps)
    with folder.locked():
        schedule = _Schedule(ordered, folder)
        yield from schedule.found()
        for name, seconds in _run(schedule.waiting, workers, on_report or _ignore):
            yield schedule.finished(name, seconds)
            yield from schedule.found()


class _Schedule:
    """Which steps are done, and which can run."""

    def __init__(self, ordered: Sequence[Step], folder: RunFolder) -> None:
        self.waiting: deque[_Task] = deque()
        self._ordered = ordered
        self._folder = folder
        self._keys: dict[str, str] = {}
        self._done: dict[str, StepRecord] = {}

    def found(self) -> Iterator[FinishedStep]:
        """Yield the steps whose files are there, and let those wait that can run now."""
        for step in self._ordered:  # each comes after all that it needs
            if step.name in self._keys or not all(name in self._done for name in step.needs):
                continue
            key = self._keys[step.name] = step.key({name: self._done[name].output for name in step.needs})
            record = _finished(self._folder, step.name, key)
            if record is None:
                inputs = {name: self._folder.files(name) for name in step.needs}
                self.waiting.append(_Task(step, self._folder.begin(step.name, key), inputs))
            else:
                yield self._with(step.name, record, was_run=False)

    def finished(self, name: str, seconds: float) -> FinishedStep:
        """Record a step that was run."""
        return self._with(name, self._folder.finish(name, self._keys[name], seconds), was_run=True)

    def _with(self, name: str, record: StepRecord, *, was_run: bool) -> FinishedStep:
        self._done[name] = record
        return FinishedStep(name, len(self._done), len(self._ordered), record, was_run)


def _finished(folder: RunFolder, name: str, key: str) -> StepRecord | None:
    record = folder.adopt(name, key) or folder.record(name)
    return record if record is not None and record.key == key and folder.is_whole(name) else None


def _run(waiting: deque[_Task], workers: int, on_report: Callable[[str, Any], None]) -> Iterator[tuple[str, float]]:
    """Run the waiting tasks, which grow after each result, and yield the name and the seconds of each.

    This process runs a task that is the only one, with all cores.
    """
    with start_processes(_timed_reporting, workers, num_threads=1) as pool:
        while waiting:
            if workers > 1 and len(waiting) > 1:
                for task, seconds in pool.run_growing(waiting, lambda content: on_report(*content), num_left=1):
                    yield task.step.name, seconds
                continue
            task = waiting.popleft()

            def report(content: Any, name: str = task.step.name) -> None:
                on_report(name, content)

            yield task.step.name, _timed(task, report)


def _timed_reporting(task: _Task, report: Report) -> float:
    return _timed(task, lambda content: report((task.step.name, content)))


def _timed(task: _Task, report: Report) -> float:
    start = time.monotonic()
    task.step.work(task.work, task.inputs, report)
    return time.monotonic() - start


def _ignore(name: str, content: object) -> None:
    pass
