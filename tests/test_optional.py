"""Tests that need a package of an extra are skipped where it is missing, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.plan import MARK, gpu_tests
from tests.optional import missing_package, packages_of_extras

ROOT = Path(__file__).parents[1]

# Missing on a GPU machine. accelerate is no such package: PEFT, a core dependency, imports it.
ABSENT = (
    "datasets", "fastapi", "httptools", "hypothesis", "matplotlib", "openai", "playwright", "prometheus_client",
    "psycopg", "pytest_timeout", "schemathesis", "sqlalchemy", "starlette", "trl", "uvicorn", "uvloop",
)  # fmt: skip

# The import system of this process finds none of the packages. Plugins of pytest are loaded by their packages, so
# pytest does not look for those that are there.
COLLECT = """
import json, sys
from importlib.machinery import PathFinder
import pytest

absent = set(sys.argv[1].split(","))

class Without(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Without

class Collected:
    tests, skipped, failed = {}, {}, []
    def pytest_collectreport(self, report):
        if report.skipped:
            self.skipped[report.nodeid] = report.longrepr[2]
        elif report.failed:
            self.failed.append(report.nodeid)
    def pytest_collection_finish(self, session):
        for item in session.items:
            self.tests[item.nodeid] = item.get_closest_marker("gpu") is not None

code = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[2:]], plugins=[Collected()])
print()
print(json.dumps({"code": code, "tests": Collected.tests, "skipped": Collected.skipped, "failed": Collected.failed}))
"""


def _collected(absent: tuple[str, ...], *arguments: str) -> dict[str, Any]:
    """Collect the suite in a process that has none of the packages."""
    command = [sys.executable, "-c", COLLECT, ",".join(absent), *arguments]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _test_files(*folders: str) -> Iterator[Path]:
    for folder in folders:
        yield from (ROOT / "tests" / folder).rglob("test_*.py")


@pytest.mark.slow
def test_the_suite_is_collected_without_the_optional_packages() -> None:
    found = _collected(ABSENT, "-m", "gpu or not gpu")
    assert (found["code"], found["failed"]) == (0, [])
    # a reason names one of the absent packages
    reasons = {f"Skipped: {name} is not installed" for name in ABSENT}
    assert {reason for reason in found["skipped"].values() if reason not in reasons} == set()
    assert found["skipped"]["tests/users/profiles/test_store.py"] in reasons
    # files with tests for a GPU are collected, and `make gpu` runs their folders
    collected = {node.partition("::")[0] for node in found["tests"]}
    for_gpu = {node.partition("::")[0] for node, is_gpu in found["tests"].items() if is_gpu}
    marked = {str(file.relative_to(ROOT)) for file in _test_files(".") if MARK.search(file.read_text())}
    assert len(for_gpu) >= 5
    assert marked - for_gpu == set()
    assert {"/".join(Path(file).parts[:2]) for file in for_gpu} == set(gpu_tests())
    # files are skipped only where they import an absent package
    core = {
        str(file.relative_to(ROOT))
        for file in _test_files("adapters", "declare", "files", "generation", "merging", "methods", "mixing")
        if "from hypothesis import" not in file.read_text()
    }
    assert len(core) > 40
    assert core - collected == set()


@pytest.mark.slow
def test_an_extra_can_be_required() -> None:
    found = _collected(("sqlalchemy",), "--require-extras", "tests/users")
    assert found["code"] == pytest.ExitCode.INTERRUPTED
    assert "tests/users/profiles/test_store.py" in found["failed"]
    assert found["skipped"] == {}


def test_the_packages_of_the_extras_are_read_from_pyproject() -> None:
    packages = packages_of_extras()
    assert {"fastapi", "prometheus_client", "pytest_timeout", "psycopg", "triton"} <= packages
    assert not {"torch", "personalized_soups"} & packages


def test_only_a_missing_package_of_an_extra_is_an_excuse() -> None:
    error = ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
    wrapped = RuntimeError("collection failed")
    wrapped.__cause__ = error
    assert missing_package(wrapped, frozenset({"uvicorn"})) == "uvicorn"
    assert missing_package(wrapped, frozenset({"fastapi"})) is None
    assert missing_package(ModuleNotFoundError("no submodule", name="uvicorn.new"), frozenset({"uvicorn"})) is None
    assert missing_package(RuntimeError("uvicorn"), frozenset({"uvicorn"})) is None
    assert missing_package(None, frozenset({"uvicorn"})) is None
