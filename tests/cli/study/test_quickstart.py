"""`psoups quickstart` as a process: bad input, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "personalized_soups", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)


def test_an_unknown_basis_and_a_file_as_output_are_usage_errors(tmp_path: Path) -> None:
    wrong = run("quickstart", "--basis", "fixed", "--out", tmp_path / "run")
    assert wrong.returncode == 2
    assert wrong.stderr.splitlines()[0] == "error: unknown basis 'fixed'"
    assert not (tmp_path / "run").exists()

    (tmp_path / "file").write_text("mine")
    blocked = run("quickstart", "--out", tmp_path / "file")
    assert blocked.returncode == 2
    assert "not a folder" in blocked.stderr
    assert "Traceback" not in blocked.stderr
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.slow
def test_ctrl_c_stops_every_process_and_prints_how_to_resume(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "personalized_soups", "quickstart", "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        printed = interrupted(process, out)
    finally:
        if is_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130
    assert "Traceback" not in printed
    assert "resumes the run" in printed
    assert printed.rstrip().endswith("interrupted")


def interrupted(process: subprocess.Popen[str], out: Path) -> str:
    """Press Ctrl-C in the first stage, wait until no process of the group is left, and return what it printed."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    # the first stage has begun once there is a worker and the tracker of shared resources
    while not (out / "study.json").is_file() or len(children.read_text().split()) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    _, printed = process.communicate()
    while is_alive(process.pid):
        time.sleep(0.02)
    return printed


def is_alive(group: int) -> bool:
    """Say whether any process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
