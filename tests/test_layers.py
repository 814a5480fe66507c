"""No cycle between folders at any depth, and none between files.

import-linter checks the layers of `pyproject.toml`, file by file. Two folders can import each other without a cycle of
files, so this module builds the graph of folders itself. Imports under `TYPE_CHECKING` count: readers follow them too.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "personalized_soups"


def _modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def _imported(source: str, modules: Mapping[str, Path]) -> Iterator[str]:
    """Yield the package's modules that `source` imports, wherever in the file the import is."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            module = name if name in modules else name.rpartition(".")[0]
            if module in modules:
                yield module


def file_graph() -> dict[str, set[str]]:
    modules = _modules()
    return {
        name: set(_imported(path.read_text(encoding="utf-8"), modules)) - {name, PACKAGE}
        for name, path in modules.items()
    }


def folder_graph(files: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Return which folders import from which; a folder is its own files, without those of the folders in it."""
    modules = _modules()

    def folder_of(name: str) -> str:
        return modules[name].parent.relative_to(ROOT).as_posix()

    graph: dict[str, set[str]] = {}
    for name, imports in files.items():
        # whoever imports the package gets its version alone, and nothing imports __main__
        if name not in {PACKAGE, f"{PACKAGE}.__main__"}:
            graph.setdefault(folder_of(name), set()).update(folder_of(other) for other in imports)
    return {folder: others - {folder} for folder, others in graph.items()}


def _cycle(graph: Mapping[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_cycle_is_found() -> None:
    assert set(_cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}})) == {"a", "b", "c"}
    assert _cycle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_graph_sees_imports_inside_functions_and_for_types_only() -> None:
    modules = {f"{PACKAGE}.errors": Path(), f"{PACKAGE}.bank": Path(), f"{PACKAGE}.cli.render": Path()}
    source = f"""
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from {PACKAGE}.bank import ExpertBank
def f():
    from {PACKAGE}.cli import render
    import {PACKAGE}.errors
    import {sys.__name__}
"""
    assert set(_imported(source, modules)) == set(modules)


@pytest.mark.parametrize("level", ["files", "folders"])
def test_nothing_imports_in_a_circle(level: str) -> None:
    files = file_graph()
    assert len(files) > 150
    assert _cycle(files if level == "files" else folder_graph(files)) == []
