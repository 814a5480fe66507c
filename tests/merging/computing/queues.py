"""Queues of a device that is as fast, or as slow, as can be: what the GPU's path does with its buffers, on a CPU."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class EagerQueue:
    """A device that is done at once: what the host has not taken yet is overwritten at the earliest."""

    def begin(self) -> None: ...

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: None


class LazyQueue:
    """A device that does nothing before somebody waits: what it has not read yet must not be overwritten."""

    def __init__(self) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.most = self.begun = 0

    def begin(self) -> None:
        self.begun += 1

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        assert self.begun == 1
        self.waiting.append(work)
        self.most = max(self.most, len(self.waiting))

        def wait() -> None:
            while work in self.waiting:
                self.waiting.popleft()()

        return wait
