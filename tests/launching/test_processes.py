"""Worker processes: tasks, results, reports, errors, and processes that die."""

from __future__ import annotations

import fcntl
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from pathlib import Path

import pytest

from personalized_soups.errors import InputError, RunError
from personalized_soups.launching.processes import Report, start_processes


def square(task: int, report: Report) -> tuple[int, str, int]:
    """Return the square, the thread setting and the process; report twice."""
    import torch

    if task < 0:
        raise InputError("a negative number", where=str(task), mend="give a positive one")
    if task == 13:
        raise FileNotFoundError(2, "no such thing", "thirteen")
    if task == 99:
        os.kill(os.getpid(), signal.SIGKILL)
    report(("begin", task))
    report(("end", task))
    assert torch.get_num_threads() == 1
    return task * task, os.environ["OMP_NUM_THREADS"], os.getpid()


@pytest.mark.distributed
@pytest.mark.slow
def test_tasks_are_shared_by_processes_that_stay() -> None:
    reports: list[tuple[str, int]] = []
    before = os.environ.get("OMP_NUM_THREADS")
    with start_processes(square, 2, num_threads=1) as pool:
        results = dict(pool.run([1, 2, 3, 4, 5], reports.append))
        again = dict(pool.run([6, 7]))
        assert list(pool.run([])) == []
    assert {task: result[:2] for task, result in results.items()} == {n: (n * n, "1") for n in range(1, 6)}
    assert again[6][0] == 36
    processes = {process for *_, process in results.values()}
    assert len(processes) == 2
    assert {process for *_, process in again.values()} <= processes
    assert os.getpid() not in processes
    for task in range(1, 6):
        assert [kind for kind, number in reports if number == task] == ["begin", "end"]
    assert os.environ.get("OMP_NUM_THREADS") == before
    for process in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


@pytest.mark.distributed
@pytest.mark.slow
def test_tasks_that_are_added_after_a_result_run_in_the_same_processes() -> None:
    waiting = deque([1, 2])
    results: dict[int, tuple[int, str, int]] = {}
    with start_processes(square, 2, num_threads=1) as pool:
        for task, result in pool.run_growing(waiting):
            results[task] = result
            if task < 3:
                waiting.append(task + 10)
        assert sorted(results) == [1, 2, 11, 12]
        assert len({process for *_, process in results.values()}) <= 2
        waiting.extend([3, 4, 5])
        some = dict(pool.run_growing(waiting, num_left=1))
        assert sorted([*some, *waiting]) == [3, 4, 5]  # the last one starts only if another is still busy
        waiting.extend([6] if not waiting else [])
        left = list(waiting)
        assert list(pool.run_growing(waiting, num_left=1)) == []
        assert list(waiting) == left


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (-1, InputError, "a negative number"),
        (13, FileNotFoundError, "no such thing"),
        (99, RunError, "exit code -9"),
        ("x", RunError, "exit code 1"),  # a TypeError, whose traceback the worker prints
    ],
)
def test_an_error_or_a_dead_process_ends_the_run(task: int, error: type[Exception], message: str) -> None:
    with start_processes(square, 2, num_threads=1) as pool, pytest.raises(error, match=message):
        list(pool.run([1, task, 2]))


def hold(path: Path, report: Report) -> None:
    """Lock the file for as long as this process lives, report, and then wait for ever."""
    lock = path.open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    report("locked")
    threading.Event().wait()


def run_and_report(path: Path, connection: multiprocessing.connection.Connection) -> None:
    """Run a pool whose task never ends, and pass its report on. This function runs in a process that is killed."""
    with start_processes(hold, 1, num_threads=1) as pool:
        list(pool.run([path], connection.send))


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_when_the_main_process_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    context = multiprocessing.get_context("spawn")
    received, sent = context.Pipe(duplex=False)
    main = context.Process(target=run_and_report, args=(tmp_path / "lock", sent))
    main.start()
    assert received.recv() == "locked"
    assert main.pid is not None
    os.kill(main.pid, number)
    main.join()
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # waits until the worker has ended
