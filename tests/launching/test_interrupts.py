from __future__ import annotations

import os
import signal
import subprocess
import sys

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
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, set())
