"""The tutorial's commands run, one after another, and print what the page shows.

The page is about a real base. The test runs its commands on the embedded one, which is faster by far.

Numbers differ between machines, so every number counts as equal to every other. Answers of trained models are only
compared with nothing at all. A line `...` of the page matches any lines.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, ROOT, blocks

PAGE = DOCS / "tutorial.md"


def _normal(text: str) -> list[str]:
    """Return the lines with single spaces and `#` for each number; rules of tables and empty lines are left out."""
    lines = (" ".join(re.sub(r"-?\d[\d.]*(e-?\d+)?", "#", line).split()) for line in text.splitlines())
    return [line for line in lines if line and set(line) - set("─━ ")]


def matches(shown: str, printed: str) -> bool:
    """Return whether `printed` is what the page shows."""
    pattern = "".join(r"(?:.*\n)*" if line == "..." else re.escape(line) + r"\n" for line in _normal(shown))
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in _normal(printed))) is not None


def steps(console: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block with the output that the block shows for it."""
    for part in re.split(r"^\$ ", console, flags=re.MULTILINE)[1:]:
        command, _, output = re.sub(r"\\\n\s*", "", part).partition("\n")
        yield command, output


def test_outputs_match_up_to_numbers_and_left_out_lines() -> None:
    assert matches(" loss   0.39\n", "\n loss  12.5  \n\n")
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert matches("a\n...\n", "a\n")
    assert not matches(" loss   0.39\n", " margin 0.39\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a\nb\n", "a\n")


def test_commands_are_told_from_their_output() -> None:
    assert list(steps("$ one --x\n1\n2\n$ two\n")) == [("one --x", "1\n2\n"), ("two", "")]
    assert list(steps("$ one \\\n    --x\n1\n")) == [("one --x", "1\n")]


def test_the_page_shows_every_step() -> None:
    commands = [command for block in blocks(PAGE) if block.kind == "console" for command, _ in steps(block.text)]
    used = [command.split()[1] for command in commands if command.startswith("psoups ")]
    for name in ("pairs", "train", "doctor", "merge", "verify", "generate", "sweep", "profile", "serve"):
        assert name in used


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_commands_print_what_the_page_shows(tmp_path: Path) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    scripts = str(Path(sys.executable).parent)
    # the current folder leaves the checkout, so the package must be found from there
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
        "COLUMNS": "80",
    }
    port = _free_port()
    with _background() as started:
        for block in blocks(PAGE):
            if block.caption is not None:
                (tmp_path / block.caption).write_text(block.text, encoding="utf-8")
            elif block.kind == "console":
                for command, shown in steps(
                    block.text.replace("8000", str(port)).replace("--base smollm2", "--base tiny")
                ):
                    if command.endswith("&"):
                        with (tmp_path / "server.log").open("wb") as log:
                            server = subprocess.Popen(
                                command[:-1].split(), cwd=tmp_path, env=environment, stdout=log, stderr=log
                            )
                        started.append(server)
                        _wait_until_ready(port, server)
                        continue
                    done = subprocess.run(
                        ["bash", "-c", command],
                        cwd=tmp_path,
                        env=environment,
                        capture_output=True,
                        text=True,
                        timeout=600,
                        check=False,
                    )
                    is_error = shown.startswith("error:")
                    assert (done.returncode != 0) == is_error, f"line {block.line}: {command}\n{done.stderr}"
                    printed = done.stderr if is_error else done.stdout
                    if command.startswith("psoups generate"):
                        assert printed.strip() or "--out" in command
                    else:
                        assert matches(shown, printed), f"line {block.line}: {command}\n{printed}"


@contextmanager
def _background() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
            process.wait(timeout=60)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5):
                return
        except OSError:  # refused, reset, timed out
            time.sleep(0.2)
    pytest.fail("the server does not answer")
