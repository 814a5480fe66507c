"""Run a list of tasks in worker processes on this machine.

A task list is a function and the tasks to call it with: values that can be pickled, so the same list could run
elsewhere. Processes are spawned, not forked: torch's threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any, Generic, NoReturn, TypeVar

from personalized_soups.errors import RunError, SoupError
from personalized_soups.launching.interrupts import ctrl_c_deferred

Task = TypeVar("Task")
Result = TypeVar("Result")
Report = Callable[[Any], None]
"""Sends a progress report, any value that can be pickled, from a task to the process that started it."""

_THREADS = "OMP_NUM_THREADS"
_SECONDS_TO_STOP = 10.0


@dataclass(frozen=True, slots=True)
class _Worker:
    process: SpawnProcess
    connection: Any  # both directions: tasks to the worker, messages back


class ProcessPool(Generic[Task, Result]):
    """Worker processes that call one function; `start_processes` makes a pool and stops its processes."""

    def __init__(self, function: Callable[[Task, Report], Result], count: int, *, num_threads: int) -> None:
        self._function = function
        self._count = count
        self._num_threads = num_threads
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task], on_report: Report = lambda _: None) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, in the order of completion.

        Processes start with the first tasks and stay for the next call. Read the iterator to its end before that call.

        Args:
            tasks: the arguments of the pool's function.
            on_report: receives the reports of all tasks, in this process.

        Raises:
            SoupError, OSError: the first such error of any task.
            RunError: if a worker process ended, by another exception or a signal.
        """
        self._start(min(self._count, len(tasks)))
        waiting = deque(tasks)
        idle = deque(self._workers)
        busy: dict[Any, tuple[_Worker, Task]] = {}
        while waiting or busy:
            while waiting and idle:
                worker, task = idle.popleft(), waiting.popleft()
                _send(worker, task)
                busy[worker.connection] = worker, task
            for connection in wait(list(busy)):
                worker, task = busy[connection]
                kind, content = _receive(worker)
                if kind == "failed":
                    raise content
                if kind == "report":
                    on_report(content)
                    continue
                del busy[connection]
                idle.append(worker)
                yield task, content

    def stop(self) -> None:
        """End all processes; kill those that still run after ten seconds."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker returns
        for worker in self._workers:
            worker.process.join(timeout=0.2)
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=_SECONDS_TO_STOP)
            if worker.process.exitcode is None:
                worker.process.kill()
        self._workers.clear()

    def _start(self, count: int) -> None:
        before = os.environ.get(_THREADS)
        os.environ[_THREADS] = str(self._num_threads)  # a worker's OpenMP reads it when the worker imports torch
        try:
            with ctrl_c_deferred():
                while len(self._workers) < count:
                    self._workers.append(self._new_worker())
        finally:
            _restore(_THREADS, before)

    def _new_worker(self) -> _Worker:
        context = multiprocessing.get_context("spawn")
        connection, other_end = context.Pipe()
        arguments = (other_end, self._function, self._num_threads)
        process = context.Process(target=_work, args=arguments, daemon=True)
        process.start()
        other_end.close()  # the worker then holds the only copy, so that its end is seen here as an end of file
        return _Worker(process, connection)


@contextmanager
def start_processes(
    function: Callable[[Task, Report], Result], count: int, *, num_threads: int
) -> Iterator[ProcessPool[Task, Result]]:
    """Yield a pool of at most `count` processes; the end of the block, an error or Ctrl-C stops them.

    Args:
        function: takes a task and a function to send progress reports with. Defined at the top of a module.
        count: most processes to start.
        num_threads: threads of each process.
    """
    pool = ProcessPool(function, count, num_threads=num_threads)
    try:
        yield pool
    finally:
        pool.stop()


def _work(connection: Any, function: Callable[[Any, Report], Any], num_threads: int) -> None:
    """Run tasks until the other end of the connection closes. This function runs in the worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process stops the workers
    signal.signal(signal.SIGTERM, _leave)
    import torch

    torch.set_num_threads(num_threads)  # on hyperthreads, MKL would use fewer than the environment variable says

    def report(content: Any) -> None:
        connection.send(("report", content))

    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        try:
            result = function(task, report)
        except (SoupError, OSError) as error:
            connection.send(("failed", error))
        else:
            connection.send(("done", result))


def _leave(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # unlike the signal's default action, this runs `finally` blocks


def _send(worker: _Worker, task: object) -> None:
    try:
        worker.connection.send(task)
    except OSError:
        raise _lost(worker) from None


def _receive(worker: _Worker) -> tuple[str, Any]:
    try:
        message: tuple[str, Any] = worker.connection.recv()
    except (EOFError, OSError):
        raise _lost(worker) from None
    return message


def _lost(worker: _Worker) -> RunError:
    worker.process.join(timeout=_SECONDS_TO_STOP)
    return RunError(
        f"a worker process ended with exit code {worker.process.exitcode}",
        where=f"process {worker.process.pid}",
        mend="read the message of that process above; without a message, memory may have run out: use fewer workers",
    )


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
