"""Lines of a pipe, and single keys of a pseudo-terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator

import pytest

from personalized_soups.cli.serve.interview.keyboard import KeyKeyboard, LineKeyboard, opened_keyboard


def test_lines_are_read_in_lower_case_until_the_end() -> None:
    with opened_keyboard(io.StringIO("A\n  Tie \n\nb")) as keyboard:
        assert isinstance(keyboard, LineKeyboard)
        keyboard.discard()  # lines that wait in a pipe are meant for the next questions
        assert [keyboard.read() for _ in range(6)] == ["a", "tie", "", "b", None, None]


@pytest.fixture
def terminal() -> Iterator[tuple[int, int]]:
    if sys.platform == "win32":
        pytest.skip("Windows has no pseudo-terminals")
    outside, inside = os.openpty()
    yield outside, inside
    os.close(outside)
    os.close(inside)


def test_keys_are_read_one_by_one_without_enter(terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    import termios

    monkeypatch.setenv("TERM", "xterm")
    outside, inside = terminal
    before = termios.tcgetattr(inside)
    with os.fdopen(os.dup(inside)) as stdin, opened_keyboard(stdin) as keyboard:
        assert isinstance(keyboard, KeyKeyboard)
        os.write(outside, b"Ab")
        assert keyboard.read() == "a"
        during = termios.tcgetattr(inside)[3]
        assert not during & (termios.ECHO | termios.ICANON)
        assert during & termios.ISIG  # Ctrl-C still interrupts
        assert keyboard.read() == "b"
        os.write(outside, "ü".encode())
        assert keyboard.read() == "ü"
        os.write(outside, b"\x04")
        assert keyboard.read() is None
    assert termios.tcgetattr(inside) == before


def test_the_last_letter_of_an_arrow_key_is_not_a_choice(terminal: tuple[int, int]) -> None:
    outside, inside = terminal
    keyboard = KeyKeyboard(inside)
    os.write(outside, b"\x1b[A")
    assert keyboard.read() == "\x1b[a"
    os.write(outside, b"b")
    assert keyboard.read() == "b"


def test_keys_that_were_pressed_before_the_question_are_discarded(terminal: tuple[int, int]) -> None:
    outside, inside = terminal
    keyboard = KeyKeyboard(inside)
    os.write(outside, b"xaaa")
    assert keyboard.read() == "x"
    keyboard.discard()
    os.write(outside, b"b")
    assert keyboard.read() == "b"


def test_a_terminal_without_control_sequences_is_read_by_lines(
    terminal: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with os.fdopen(os.dup(terminal[1])) as stdin, opened_keyboard(stdin) as keyboard:
        assert isinstance(keyboard, LineKeyboard)
