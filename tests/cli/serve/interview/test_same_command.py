from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import pytest
import typer

from personalized_soups.cli.serve.interview.same_command import same_command


def _written(arguments: list[str], monkeypatch: pytest.MonkeyPatch, **changes: object) -> list[str]:
    written: list[str] = []
    app = typer.Typer()
    app.callback()(lambda: None)
    monkeypatch.setenv("STORE", "from-the-environment.db")

    @app.command()
    def ask(
        context: typer.Context,
        user: str,
        *,
        experts: Annotated[list[Path], typer.Option()],
        questions: int = 10,
        store: Annotated[str, typer.Option(envvar="STORE")] = "profiles.db",
        restart: Annotated[bool, typer.Option("--restart")] = False,
        as_json: Annotated[bool, typer.Option("--json")] = False,
    ) -> None:
        written.extend(shlex.split(same_command(context, changes)))

    app(["ask", *arguments], prog_name="psoups", standalone_mode=False)
    return written


def test_a_command_is_written_as_it_was_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["ada lovelace's", "--experts", "a b", "--experts", "c", "--json"]
    assert _written(typed, monkeypatch) == ["psoups", "ask", *typed]


def test_options_are_changed_added_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["ada", "--restart", "--questions", "5", "--experts", "c"]
    written = _written(typed, monkeypatch, questions=15, restart=False, as_json=True)
    assert written == ["psoups", "ask", "ada", "--experts", "c", "--questions", "15", "--json"]
