"""Let a user end a long search early, without losing what it has found."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Within the block, take the first Ctrl-C as a request to stop. Yield a function that returns whether it came.

    A second Ctrl-C raises KeyboardInterrupt. Outside the main thread, and in processes that ignore Ctrl-C, the block
    changes nothing, and the function returns False.
    """
    received: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: False
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            before(number, frame)
        received.append(number)

    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGINT, before)
