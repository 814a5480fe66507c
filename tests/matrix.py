"""Run the suite with several versions of the packages: `make matrix`.

python -m tests.matrix [ROW ...] [--install-only] [-- PYTEST ARGUMENTS]

Each row of the table below has a virtual environment in build/matrix, or in $PSOUPS_MATRIX_DIR. An environment that is
installed is used again until its row asks for other versions. A CUDA build of PyTorch takes 7 GB of disk. The last line
on stdout is one JSON object.
"""

# ruff: noqa: T201 # it prints its table

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]

# Shown in the table of results.
SHOWN = ("torch", "transformers", "peft", "safetensors", "numpy", "pydantic", "typer", "triton", "pytest")

# Tools that check the source, not the package in use. Their versions have no part in what the suite finds.
TOOLS = frozenset({"ruff", "mypy", "import-linter", "sphinx", "furo", "myst-parser"})


@dataclass(frozen=True, slots=True)
class Row:
    """One environment, and how the suite is run in it.

    Args:
        name: what the row is called on the command line.
        versions: the version of each pinned package; pip chooses the others.
        pytest: arguments for pytest, each with the reason why it is needed.
    """

    name: str
    versions: Mapping[str, str]
    pytest: Mapping[str, str]


_OTHER_VERSIONS = {
    "-Wdefault": "other versions of the libraries give other warnings, and nothing of ours can be changed for them",
    "--deselect=tests/cli/test_reference.py": "docs/reference/cli.md holds the wording of the typer in constraints.txt",
}


def rows() -> list[Row]:
    """Return the table."""
    pinned = constraints((ROOT / "constraints.txt").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return [
        Row("lowest", lowest(project), _OTHER_VERSIONS),
        # what the GPU machine has; torch brings triton 3.6, whose interpreter does not run under NumPy 2.4
        Row("card", {**pinned, "torch": "2.11.*", "transformers": "5.17.*", "numpy": "2.3.*"}, _OTHER_VERSIONS),
        Row("newest", pinned, {}),
    ]


def lowest(project: Mapping[str, Any]) -> dict[str, str]:
    """Return the lowest version of each package that the project's own requirements allow.

    Raises:
        ValueError: if a requirement has no lower bound, so that the table would leave it out.
    """
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for name in ("train", "plot", "serve", "postgres", "smollm2", "dev")
                                         for line in extras[name])]  # fmt: skip
    versions: dict[str, str] = {}
    for requirement in map(Requirement, lines):
        name = canonicalize_name(requirement.name)
        if name == canonicalize_name(project["name"]) or name in TOOLS:
            continue
        bounds = [each.version for each in requirement.specifier if each.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{requirement} has no lower bound")
        if requirement.marker is None or requirement.marker.evaluate():
            versions[name] = bounds[0]
    return versions


def constraints(text: str) -> dict[str, str]:
    """Return the versions that a constraints file pins."""
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return dict(line.split("==") for line in lines if line)


def install(row: Row, folder: Path) -> str | None:
    """Make the row's environment where it is not made yet; return pip's last words if that fails."""
    done = folder / "installed.json"
    wanted = json.dumps([sys.version, dict(row.versions)])
    if done.is_file() and done.read_text(encoding="utf-8") == wanted:
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pins = folder / "constraints.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in row.versions.items()), encoding="utf-8")
    command = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c",
               str(pins), "-e", ".[dev]"]  # fmt: skip
    ended = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    if ended.returncode != 0:
        return ended.stderr.strip()
    done.write_text(wanted, encoding="utf-8")
    return None


def installed_versions(folder: Path) -> dict[str, str]:
    """Return the versions of the packages that the table of results shows."""
    places = [str(place) for place in folder.glob("lib/python*/site-packages")]
    found: dict[str, str] = {canonicalize_name(each.name): each.version for each in distributions(path=places)}
    return {name: found[name] for name in SHOWN if name in found}


def run_suite(row: Row, folder: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Run pytest in the row's environment; return its exit code and its last line."""
    environment = {**os.environ, "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [str(folder / "bin/python"), "-m", "pytest", "-q", "-rfE", "--tb=short", *row.pytest, *arguments]
    log = folder / "pytest.txt"
    with log.open("w", encoding="utf-8") as out:
        code = subprocess.run(command, cwd=ROOT, env=environment, check=False, stdout=out, stderr=out).returncode
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    for line in lines:
        if re.match(r"(FAILED|ERROR) ", line):
            print(f"    {line}")
    return code, next((line for line in reversed(lines) if line.strip()), "nothing was printed").strip("= ")


def main(argv: Sequence[str] | None = None) -> int:
    """Install and run the rows that are asked for; return 1 if one cannot be installed or its tests fail."""
    table = {row.name: row for row in rows()}
    parser = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__.partition("\n")[0])
    parser.add_argument("row", nargs="*", help=f"rows to run: {', '.join(table)}; all if none is named")
    parser.add_argument("--install-only", action="store_true", help="make the environments, run no test")
    given = list(sys.argv[1:] if argv is None else argv)
    split = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:split])
    if unknown := [name for name in options.row if name not in table]:
        names = ", ".join(table)
        raise SystemExit(f"error: no row is called {', '.join(unknown)}\n   at: ROW\n mend: choose from {names}")
    top = Path(os.environ.get("PSOUPS_MATRIX_DIR") or ROOT / "build" / "matrix").absolute()
    results = []
    for row in [table[name] for name in options.row or table]:
        print(f"{time.strftime('%H:%M:%S')} {row.name}", flush=True)
        results.append(_result(row, top / row.name, given[split + 1 :], runs=not options.install_only))
    for result in results:
        versions = " ".join(f"{name} {version}" for name, version in result["versions"].items())
        print(f"{result['row']:8} {result['outcome']}\n         {versions}")
    print(json.dumps({"python": sys.version.split()[0], "rows": results}))
    return int(not all(result["passed"] for result in results))


def _result(row: Row, folder: Path, arguments: Sequence[str], *, runs: bool) -> dict[str, Any]:
    for argument, reason in row.pytest.items():
        print(f"    {argument}: {reason}")
    if fault := install(row, folder):
        print(f"    {fault}")
        return {"row": row.name, "passed": False, "outcome": "cannot be installed", "versions": {}}
    code, outcome = run_suite(row, folder, arguments) if runs else (0, "installed")
    return {"row": row.name, "passed": code == 0, "outcome": outcome, "versions": installed_versions(folder)}


if __name__ == "__main__":
    sys.exit(main())
