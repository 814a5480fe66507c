from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from personalized_soups.launching.interrupts import ctrl_c_deferred


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
def test_ctrl_c_within_the_block_reaches_this_process_after_it_and_a_new_process_never() -> None:
    script = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
    reached = []
    with pytest.raises(KeyboardInterrupt), ctrl_c_deferred():  # noqa: PT012 # the block's end raises it
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False))
    assert [done.stdout for done in reached] == ["alive\n"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())


@pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")
def test_ctrl_c_that_another_thread_receives_is_deferred_too() -> None:
    ending, steps = threading.Event(), []
    thread = threading.Thread(target=ending.wait)  # it does not block the signal
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), ctrl_c_deferred():  # noqa: PT012 # the block's end raises it
            signal.pthread_kill(thread.ident or 0, signal.SIGINT)
            steps.append("after the signal")
    finally:
        ending.set()
        thread.join()
    assert steps == ["after the signal"]


def test_without_ctrl_c_nothing_is_raised() -> None:
    handler = signal.getsignal(signal.SIGINT)
    with ctrl_c_deferred():
        pass
    assert signal.getsignal(signal.SIGINT) is handler
