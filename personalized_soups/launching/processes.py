"""Run a list of tasks in worker processes on this machine.

A worker process calls one function for each task. The function, the tasks and the results must be picklable. Processes
are spawned, not forked, because torch's threads do not survive a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
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
"""A function with which a task sends a progress report, any picklable value, to the main process."""

_THREADS = "OMP_NUM_THREADS"
_SECONDS_TO_STOP = 10.0


@dataclass(frozen=True, slots=True)
class _Worker:
    process: SpawnProcess
    connection: Any  # both directions: tasks to the worker, messages back


class ProcessPool(Generic[Task, Result]):
    """Worker processes that call one function for each task. Use `start_processes` to create a pool."""

    def __init__(self, function: Callable[[Task, Report], Result], count: int, *, num_threads: int) -> None:
        self._function = function
        self._count = count
        self._num_threads = num_threads
        self._workers: list[_Worker] = []

    def run(self, tasks: Sequence[Task], on_report: Report = lambda _: None) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, in the order of completion.

        The first call starts the processes, and later calls use them again. Read the iterator to its end before the
        next call.

        Args:
            tasks: the tasks. The pool's function is called once with each task.
            on_report: called in this process with each progress report of a task.

        Raises:
            SoupError, OSError: if a task raised such an error. Only the first one is raised.
            RunError: if a worker process ended because of another exception or a signal.
        """
        yield from self.run_growing(deque(tasks), on_report)

    def run_growing(
        self, waiting: deque[Task], on_report: Report = lambda _: None, *, num_left: int = 0
    ) -> Iterator[tuple[Task, Result]]:
        """Yield each task with its result, like `run`, while the caller may add tasks after each result.

        Args:
            waiting: the tasks. A task leaves it when a process begins with it.
            on_report: as for `run`.
            num_left: end when no process is busy and at most so many tasks are waiting, which stay there.

        Raises:
            SoupError, OSError, RunError: in the same cases as `run`.
        """
        busy: dict[Any, tuple[_Worker, Task]] = {}
        idle = deque(self._workers)
        while busy or len(waiting) > num_left:
            num_before = len(self._workers)
            self._start(min(self._count, len(busy) + len(waiting)))
            idle += self._workers[num_before:]
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
        """Stop all processes. Kill a process that is still running after ten seconds."""
        for worker in self._workers:
            worker.connection.close()  # an idle worker process then ends
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
        os.environ[_THREADS] = str(self._num_threads)  # OpenMP reads the variable when a worker imports torch
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
        other_end.close()  # only the worker then holds this end, so its exit is seen here as an end of file
        return _Worker(process, connection)


@contextmanager
def start_processes(
    function: Callable[[Task, Report], Result], count: int, *, num_threads: int
) -> Iterator[ProcessPool[Task, Result]]:
    """Yield a pool of at most `count` processes. The end of the block stops them, also after an error or Ctrl-C.

    Args:
        function: called with a task and with a function that sends progress reports. `function` must be defined at the
            top level of a module.
        count: the maximum number of processes.
        num_threads: the number of torch threads in each process.
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
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(num_threads)  # without this call, MKL uses fewer threads on hyperthreads

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


def _end_with_parent() -> None:
    """Wait until the main process has ended, then end this process. A killed main process stops no workers itself."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


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
