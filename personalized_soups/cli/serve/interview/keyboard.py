"""Read a user's choices: single keys at a terminal, else lines of standard input."""

from __future__ import annotations

import os
import select
import sys
from codecs import getincrementaldecoder
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

_ESCAPE = "\x1b"
_END = "\x04"  # Ctrl-D

# How long the rest of a key's escape sequence may take. The arrow key "up" sends ESC [ A, which must not count as A.
_ESCAPE_SECONDS = 0.05


class Keyboard(Protocol):
    """Something that a user's choices are read from."""

    def read(self) -> str | None:
        """Return the next input in lower case, without blanks around it. Return None at the end of the input."""

    def discard(self) -> None:
        """Discard the keys that were pressed before the question was shown."""


@contextmanager
def opened_keyboard(stdin: TextIO) -> Iterator[Keyboard]:
    """Yield a keyboard that reads single keys if `stdin` is a terminal, else one that reads lines.

    On Windows and in terminals without control sequences (TERM=dumb), it reads lines.
    """
    if sys.platform == "win32" or not stdin.isatty() or os.environ.get("TERM") == "dumb":
        yield LineKeyboard(stdin)
        return
    import termios

    descriptor = stdin.fileno()
    before = termios.tcgetattr(descriptor)
    try:
        yield KeyKeyboard(descriptor)
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)


class LineKeyboard:
    """Reads one choice from each line of a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def read(self) -> str | None:
        """Return the next line. See `Keyboard`."""
        line = self._stream.readline()
        return line.strip().lower() if line else None

    def discard(self) -> None:
        """Discard nothing: lines of a file or a pipe may be written before the questions are shown."""


class KeyKeyboard:
    """Reads one key at a time from a terminal, without Enter and without echo. Ctrl-C interrupts as usual."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def read(self) -> str | None:
        """Wait for a key. See `Keyboard`."""
        if sys.platform == "win32":  # not reached; mypy checks this branch on Windows
            raise NotImplementedError
        import termios
        import tty

        # The mode is set before every key, because a shell may change it while the command is suspended (Ctrl-Z).
        # TCSANOW keeps keys that were pressed after the question was shown.
        tty.setcbreak(self._descriptor, termios.TCSANOW)
        text = self._next()
        if text == _ESCAPE:
            while select.select([self._descriptor], [], [], _ESCAPE_SECONDS)[0]:
                text += self._next()
        return None if text in {"", _END} else text.strip().lower()

    def discard(self) -> None:
        """Discard the keys that were pressed before the question was shown."""
        if sys.platform == "win32":
            raise NotImplementedError
        import termios

        termios.tcflush(self._descriptor, termios.TCIFLUSH)

    def _next(self) -> str:
        """Return the next character, or an empty text at the end of the input."""
        decoder = getincrementaldecoder("utf-8")("replace")
        while byte := os.read(self._descriptor, 1):
            if letter := decoder.decode(byte):
                return letter
        return ""
