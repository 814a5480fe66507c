"""Each case runs in a process of its own: a Ctrl-C that is not deferred would end the test run."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(signal, "pthread_sigmask"), reason="needs POSIX signals")

_BEGIN = """
import os, signal, socket, subprocess, sys, threading
from personalized_soups.launching.interrupts import ctrl_c_deferred

# a shell may start a background job with Ctrl-C ignored
signal.signal(signal.SIGINT, signal.default_int_handler)
"""

_TO_THIS_PROCESS = """
child = "import os, signal; os.kill(os.getpid(), signal.SIGINT); print('alive')"
try:
    with ctrl_c_deferred():
        os.kill(os.getpid(), signal.SIGINT)
        print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout.strip(), flush=True)
        print("end of the block", flush=True)
except KeyboardInterrupt:
    print("interrupted")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, signal.pthread_sigmask(signal.SIG_BLOCK, set()))
"""

_TO_ANOTHER_THREAD = """
reader, writer = socket.socketpair()
writer.setblocking(False)
signal.set_wakeup_fd(writer.fileno())
ending = threading.Event()
thread = threading.Thread(target=ending.wait)  # it does not block the signal
thread.start()
try:
    with ctrl_c_deferred():
        signal.pthread_kill(thread.ident, signal.SIGINT)
        reader.recv(1)  # the thread has received the signal
        print("end of the block", flush=True)
except KeyboardInterrupt:
    print("interrupted")
ending.set()
thread.join()
"""

_WITHOUT = """
with ctrl_c_deferred():
    print("end of the block")
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)
"""


def _lines(script: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", _BEGIN + script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_ctrl_c_in_the_block_is_raised_at_its_end_and_a_new_process_never_receives_one() -> None:
    assert _lines(_TO_THIS_PROCESS) == ["alive", "end of the block", "interrupted", "True set()"]


def test_ctrl_c_that_another_thread_receives_is_deferred_too() -> None:
    assert _lines(_TO_ANOTHER_THREAD) == ["end of the block", "interrupted"]


def test_without_ctrl_c_nothing_is_raised() -> None:
    assert _lines(_WITHOUT) == ["end of the block", "True"]
