"""The first Ctrl-C is a request to stop, the second one ends the program."""

from __future__ import annotations

import signal
import threading

import pytest

from personalized_soups.launching.stop_requests import stop_requested


def test_the_first_ctrl_c_is_a_request_and_the_second_an_interrupt() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_requested() as stop:
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_an_error_puts_the_handler_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="wrong"), stop_requested():
        raise ValueError("wrong")
    assert signal.getsignal(signal.SIGINT) is before


def test_another_thread_changes_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    found: list[bool] = []

    def run() -> None:
        with stop_requested() as stop:
            found.append(signal.getsignal(signal.SIGINT) is before)
            found.append(stop())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [True, False]


def test_a_program_that_ignores_ctrl_c_still_ignores_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_requested() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
