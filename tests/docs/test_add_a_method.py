"""The page's code runs: the function, the `Method`, the package and the commands."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge
from tests.docs.pages import DOCS, Block, blocks
from tests.experts import write_expert
from tests.packages import install_package

PAGE = DOCS / "howto" / "add_a_method.md"


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Block]]:
    """Write the page's modules and install its package; return its blocks."""
    page = list(blocks(PAGE))
    modules = {block.caption: block.text for block in page if block.caption}
    (entry_points,) = (block.text for block in page if block.kind == "toml")
    site = tmp_path / "site"
    # pyproject.toml's table, as pip writes it
    table = entry_points.replace('[project.entry-points."personalized_soups.methods"]', "[personalized_soups.methods]")
    install_package(site, "clipping", modules["clipping.py"], table.replace('"', ""))
    (site / "clipping_row.py").write_text(modules["clipping_row.py"])
    for index, name in enumerate(("friendly", "concise")):
        write_expert(tmp_path / "experts" / name, seed=index, rank=8)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.chdir(tmp_path)
    yield page
    for name in ("clipping", "clipping_row"):
        sys.modules.pop(name, None)


def test_the_python_runs(page: list[Block], tmp_path: Path) -> None:
    (code,) = (block.text for block in page if block.kind == "python" and block.caption is None)
    exec(compile(code, PAGE, "exec"), {"__name__": "page"})
    record = json.loads((tmp_path / "my-soup" / "soup.json").read_text())
    assert record["method_source"]["function"] == "clipped"
    row = importlib.import_module("clipping_row").row
    options = MergeOptions(method=row, method_options={"density": 0.25}, rank=16)
    soup = merge(ExpertLibrary.open("experts"), Profile(weights={"friendly": 0.6, "concise": 0.4}), options)
    assert soup.plan.options == {"density": 0.25}


def test_the_commands_run(page: list[Block]) -> None:
    (console,) = (block.text for block in page if block.kind == "bash")
    for line in console.splitlines():
        name, *arguments = shlex.split(line)
        assert name == "psoups"
        subprocess.run([sys.executable, "-m", "personalized_soups", *arguments], check=True, timeout=280)
