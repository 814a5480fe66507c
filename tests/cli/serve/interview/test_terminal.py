"""`psoups profile infer` in a pseudo-terminal: single keys, Ctrl-C, and the state of the terminal afterwards."""

from __future__ import annotations

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from personalized_soups.users.profiles.store import ProfileStore
from tests.cli.serve.interview.pools import DIMENSIONS, pool_of
from tests.experts import write_expert, write_record

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals"),
]

# How long a command may print nothing. Only a failed test waits that long.
_PATIENCE_SECONDS = 120.0


class Terminal:
    """A command in a pseudo-terminal of 120 columns."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        import fcntl
        import struct
        import termios

        self.outside, self.inside = os.openpty()
        fcntl.ioctl(self.inside, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self.before = termios.tcgetattr(self.inside)
        environment = {name: value for name, value in os.environ.items() if name not in {"COLUMNS", "LINES"}}
        # The leader of a new session that opens a terminal gets it as its controlling terminal, which turns Ctrl-C into
        # a signal.
        script = f'exec "$@" 0<>{os.ttyname(self.inside)} 1>&0 2>&0'
        self.process = subprocess.Popen(
            ["sh", "-c", script, "sh", sys.executable, "-m", "personalized_soups", *arguments],
            cwd=folder,
            env={**environment, "TERM": "xterm", "PYTHONPATH": str(Path(__file__).parents[4])},
            start_new_session=True,
        )
        self._unread = ""

    def press(self, key: str) -> None:
        """Press a key."""
        os.write(self.outside, key.encode())

    def until(self, text: str) -> str:
        """Return what the command prints up to and with `text`."""
        while text not in self._unread:
            is_ready = select.select([self.outside], [], [], _PATIENCE_SECONDS)[0]
            assert is_ready, f"{text!r} is not printed after {self._unread!r}"
            self._unread += os.read(self.outside, 4096).decode()
        before, found, self._unread = self._unread.partition(text)
        return before + found

    def close(self) -> None:
        """End the command and close the terminal."""
        with contextlib.suppress(ProcessLookupError):
            self.process.kill()
        self.process.wait()
        os.close(self.outside)
        os.close(self.inside)


@pytest.fixture
def terminal(tmp_path: Path, small_base: Path) -> Iterator[Terminal]:
    for seed, (name, dimension) in enumerate(DIMENSIONS.items()):
        write_record(write_expert(tmp_path / "experts" / name, seed=seed), dimension=dimension)
    pool_of(40, experts=tmp_path / "experts", base=small_base).write(tmp_path / "experts-questions")
    running = Terminal(
        ["profile", "infer", "ada", "--experts", "experts", "--base", str(small_base), "--no-win-rate"], tmp_path
    )
    yield running
    running.close()


def test_single_keys_answer_and_ctrl_c_keeps_the_answers(terminal: Terminal, tmp_path: Path) -> None:
    import termios

    shown = terminal.until("? (help):")
    assert "question 1 of 10" in shown
    line = next(line for line in shown.splitlines() if line.startswith("A "))
    assert "    B ---" in line  # side by side
    terminal.press("a")
    assert "answer: A" in terminal.until("question 2 of 10")
    terminal.until("? (help):")
    terminal.press("\x1b[A")  # an arrow key, whose last letter is A
    assert "is not one of the keys" in terminal.until("? (help):")
    terminal.press("k")
    assert "the last answer is taken back" in terminal.until("question 1 of 10")
    terminal.until("? (help):")
    terminal.press("b")
    terminal.until("question 2 of 10")
    terminal.until("? (help):")
    terminal.press("\x03")
    assert "interrupted; your answers are kept. Continue: psoups profile infer ada" in terminal.until("--no-win-rate")
    assert terminal.process.wait() == 130
    assert termios.tcgetattr(terminal.inside) == terminal.before
    with ProfileStore.open(tmp_path / "profiles.db") as store:
        answers = store.answers.of("ada")
    assert [each.answer.choice for each in answers] == ["a" if answers[0].answer.swapped else "b"]
