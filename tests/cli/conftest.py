from __future__ import annotations

from collections.abc import Callable

import pytest

from personalized_soups.cli.app import build_app

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def psoups(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return what runs `psoups` with arguments in this process and returns exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            build_app()([str(argument) for argument in arguments], prog_name="psoups")
        printed = capsys.readouterr()
        return int(caught.value.code or 0), printed.out, printed.err

    return run
