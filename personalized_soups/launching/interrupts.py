"""Ctrl-C and worker processes: one process hears it and ends the others."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ctrl_c_ignored() -> Iterator[None]:
    """Ignore Ctrl-C within the block, and in the processes that are started there: they inherit it.

    Ctrl-C reaches the listening process, which stops the others; a worker would meet it while it imports torch.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers are the main thread's
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
