"""Handle Ctrl-C only in the main process, which then stops the worker processes."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def ctrl_c_deferred() -> Iterator[None]:
    """Defer Ctrl-C in this thread to the end of the block. Processes started in the block do not receive Ctrl-C.

    A terminal sends Ctrl-C to all processes. A new process inherits the blocked signal. So it does not raise
    KeyboardInterrupt while it is importing torch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # if the tracker started in the block, its start would unblock the signal
    received: list[int] = []
    # Another thread of this process may receive the signal, although this thread blocks it. Python then runs the
    # handler in the main thread, so the handler must be deferred too.
    is_main = threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGINT, lambda number, _: received.append(number)) if is_main else None
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if is_main:
            signal.signal(signal.SIGINT, handler)
        if received:
            signal.raise_signal(signal.SIGINT)
