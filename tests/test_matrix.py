"""The table of versions follows pyproject.toml and constraints.txt; an environment is made once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests import matrix
from tests.matrix import Row

PROJECT: dict[str, Any] = {
    "name": "the-project",
    "dependencies": ["torch>=2.6", "ruamel.yaml>=0.18.6"],
    "optional-dependencies": {
        "train": ["trl>=1.0"],
        "plot": [],
        "serve": ["Prometheus_Client>=0.21", "uvloop>=0.21; sys_platform == 'never'"],
        "postgres": ["psycopg[binary]>=3.2"],
        "smollm2": ["gguf>=0.18"],
        "dev": ["the-project[train,serve]", "triton>=3.3,<4", "ruff>=0.9"],
    },
}


def test_the_lowest_versions_are_the_bounds_of_the_requirements() -> None:
    assert matrix.lowest(PROJECT) == {
        "torch": "2.6", "ruamel-yaml": "0.18.6", "trl": "1.0", "prometheus-client": "0.21", "psycopg": "3.2",
        "gguf": "0.18", "triton": "3.3",
    }  # fmt: skip


def test_a_requirement_without_a_lower_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="numpy<3 has no lower bound"):
        matrix.lowest({**PROJECT, "dependencies": ["numpy<3"]})


def test_the_rows_of_the_repository() -> None:
    rows = {row.name: row for row in matrix.rows()}
    assert list(rows) == ["lowest", "card", "newest"]
    assert {"torch", "transformers", "peft", "fastapi", "triton", "pytest"} <= set(rows["lowest"].versions)
    assert rows["card"].versions["torch"] == "2.11.*"
    assert rows["card"].versions["peft"] == rows["newest"].versions["peft"]
    assert rows["newest"].pytest == {}  # the environment that `make test` has
    assert all(len(reason) > 20 for row in rows.values() for reason in row.pytest.values())


def test_an_environment_is_made_once_for_the_same_versions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: Sequence[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(list(command))
        if "venv" in command:
            Path(command[-1]).mkdir()
        broken = "install" in command and "bad" in Path(command[command.index("-c") + 1]).read_text()
        return subprocess.CompletedProcess(command, int(broken), "", "ERROR: no such version\n")

    monkeypatch.setattr(subprocess, "run", run)
    row = Row("one", {"torch": "2.6"}, {})
    assert matrix.install(row, tmp_path / "one") is None
    assert [("venv" in command, "install" in command) for command in commands] == [(True, False), (False, True)]
    assert (tmp_path / "one" / "constraints.txt").read_text() == "torch==2.6\n"
    assert matrix.install(row, tmp_path / "one") is None
    assert len(commands) == 2
    assert matrix.install(replace(row, versions={"torch": "bad"}), tmp_path / "one") == "ERROR: no such version"
    assert matrix.install(replace(row, versions={"torch": "bad"}), tmp_path / "one") == "ERROR: no such version"
    assert len(commands) == 6  # what failed is tried again


def test_the_result_of_a_row_is_that_of_its_tests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each row has this process' interpreter; the tests are two of a file made here."""
    file = tmp_path / "test_some.py"
    file.write_text("import os\ndef test_one(): ...\ndef test_two(): assert os.environ['GOOD'] == 'yes'\n")

    def install(row: Row, folder: Path) -> str | None:
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        python = folder / "bin" / "python"
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        return "ERROR: no such version" if row.name == "card" else None

    monkeypatch.setenv("PSOUPS_MATRIX_DIR", str(tmp_path / "matrix"))
    monkeypatch.setattr(matrix, "install", install)
    arguments = ["--", "-c", "/dev/null", "-p", "no:cacheprovider", str(file)]
    monkeypatch.setenv("GOOD", "no")
    assert matrix.main(["newest", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "test_some.py::test_two" in printed
    (result,) = json.loads(printed.splitlines()[-1])["rows"]
    assert (result["row"], result["passed"]) == ("newest", False)
    assert result["outcome"].startswith("1 failed, 1 passed in ")
    monkeypatch.setenv("GOOD", "yes")
    assert matrix.main(["newest", *arguments]) == 0
    assert "2 passed" in capsys.readouterr().out
    assert matrix.main(["card", *arguments]) == 1
    assert "cannot be installed" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no row is called oldest"):
        matrix.main(["oldest"])
