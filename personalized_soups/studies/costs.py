"""Measure what the stages of a study cost: seconds and memory."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personalized_soups.errors import RunError
from personalized_soups.studies.folder import StudyFolder, write_text

_STATUS = Path("/proc/self/status")


class Costs:
    """The seconds and the memory of each stage, added up over interrupted runs.

    The memory of a stage is an upper bound of its resident memory: the sum of the largest memory that this process and
    each worker process ever had until the end of the stage. Processes need not have reached it at the same time.
    """

    def __init__(self, folder: StudyFolder) -> None:
        self._folder = folder
        self._workers: dict[int, int] = {}

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each stage."""
        return _read(self._folder.seconds)

    @property
    def memory(self) -> dict[str, int]:
        """The memory of each stage in bytes."""
        return {stage: int(size) for stage, size in _read(self._folder.memory).items()}

    def saw(self, process: int, memory: int) -> None:
        """Store the largest memory in bytes that a worker process had so far. `process` is its id."""
        self._workers[process] = max(memory, self._workers.get(process, 0))

    def saw_children(self, count: int) -> None:
        """Store the memory of `count` worker processes that have ended. The largest of them stands for each."""
        for number in range(count):
            self.saw(-1 - number, largest_memory(of_children=True))

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's run time to the stage's seconds, and raise the stage's memory to that of the processes."""
        start = time.monotonic()
        self._workers.clear()
        try:
            yield
        finally:
            seconds, memory = self.seconds, self.memory
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
            memory[name] = max(memory.get(name, 0), largest_memory() + sum(self._workers.values()))
            write_text(self._folder.seconds, json.dumps(seconds, indent=2) + "\n")
            write_text(self._folder.memory, json.dumps(memory, indent=2) + "\n")


def largest_memory(*, of_children: bool = False) -> int:
    """Return the largest resident memory in bytes that this process ever had; on Windows, which does not count it, 0.

    With `of_children`, return that of the largest child process that has ended.
    """
    if sys.platform == "win32":
        return 0
    import resource

    if not of_children and _STATUS.is_file():
        # On Linux, getrusage also counts the process that started this one. The kernel's status file does not.
        peak = re.search(r"^VmHWM:\s*(\d+) kB$", _STATUS.read_text(encoding="utf-8"), re.MULTILINE)
        if peak is not None:
            return int(peak[1]) * 1024
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF)
    # macOS counts bytes, and Linux counts KiB.
    return int(usage.ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


def _read(path: Path) -> dict[str, float]:
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except ValueError:
        raise RunError("the file is not JSON", where=str(path), mend="delete the file and run again") from None
