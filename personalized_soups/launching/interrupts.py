"""Ctrl-C and worker processes: the main process handles Ctrl-C and stops the workers."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker


@contextmanager
def ctrl_c_deferred() -> Iterator[None]:
    """Defer Ctrl-C in this thread to the end of the block; processes started in the block do not receive it.

    A terminal sends Ctrl-C to all processes. A new process inherits the blocked signal, and so does not raise
    KeyboardInterrupt while it still imports torch.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its start, with the first process, would unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
