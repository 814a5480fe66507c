"""Queues of the fastest and the slowest possible device, to test on a CPU how the GPU's path uses its buffers."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable


class EagerQueue:
    """A device that finishes at once, so buffers that the host has not read are overwritten as early as possible."""

    def begin(self) -> None: ...

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        work()
        return lambda: None


class LazyQueue:
    """A device that works only when somebody waits, so buffers that it has not read must not be overwritten."""

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
