"""Apply the deliberate faults of mutants.toml one at a time and see that the suite turns red: `make mutants`.

Each fault is applied to a copy of the repository, never to the repository itself; the tests that should see it run
there. A test that fails kills the mutant; a fault with which the tests cannot even be collected says nothing.
"""

# ruff: noqa: T201 # it prints its table

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_name("mutants.toml")


@dataclass(frozen=True)
class Mutant:
    """One fault: `old`, which occurs once in `file`, is replaced by `new`; one of `tests` must fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    breaks: str

    def applied(self, root: Path) -> str:
        """Return the file's text with the fault.

        Raises:
            ValueError: if `old` does not occur exactly once.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        if (count := text.count(self.old)) != 1:
            raise ValueError(f"{self.name}: {self.old!r} occurs {count} times in {self.file}")
        return text.replace(self.old, self.new)


def mutants() -> list[Mutant]:
    """Return the table."""
    rows = tomllib.loads(TABLE.read_text(encoding="utf-8"))["mutant"]
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copy_repository(folder: Path) -> None:
    """Copy every file that git knows or does not ignore."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def outcome_of(root: Path, tests: Sequence[str]) -> tuple[str, str]:
    """Run tests in a copy; return `green`, `red`, or `invalid` where no test came to fail, and what says so."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=no", "-p", "no:cacheprovider", "--timeout=120", *tests]
    done = subprocess.run(command, cwd=root, env=environment, check=False, capture_output=True, text=True)
    failed = re.search(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return "green", ""
    if done.returncode == 1 and failed:
        return "red", failed[1]
    return "invalid", (done.stdout + done.stderr)[-2000:]


def tried(mutant: Mutant, root: Path) -> tuple[str, str]:
    """Apply a mutant to a copy, run its tests there and take it back; return the outcome."""
    path = root / mutant.file
    before = path.read_text(encoding="utf-8")
    try:
        path.write_text(mutant.applied(root), encoding="utf-8")
        return outcome_of(root, mutant.tests)
    except ValueError as error:
        return "invalid", str(error)
    finally:
        path.write_text(before, encoding="utf-8")


def run(chosen: Sequence[Mutant], num_jobs: int) -> int:
    """Try every mutant, print a line for each, and return how many were not killed."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch, ThreadPoolExecutor(num_jobs) as pool:
        roots: SimpleQueue[Path] = SimpleQueue()
        for number in range(num_jobs):
            root = Path(scratch) / str(number)
            copy_repository(root)
            roots.put(root)
        every = sorted({test for mutant in chosen for test in mutant.tests})
        state, message = outcome_of(Path(scratch) / "0", every)
        if state != "green":
            print(f"the tests fail without any fault: {message}")
            return len(chosen)

        def one(mutant: Mutant) -> tuple[str, str, float]:
            root, began = roots.get(), time.monotonic()
            try:
                return *tried(mutant, root), time.monotonic() - began
            finally:
                roots.put(root)

        alive = 0
        for mutant, (state, message, seconds) in zip(chosen, pool.map(one, chosen), strict=True):
            alive += state != "red"
            said = {"red": "killed", "green": "SURVIVES", "invalid": "INVALID"}[state]
            print(f"{said:8s}  {seconds:5.1f} s  {mutant.name}  ({message or mutant.breaks})", flush=True)
    print(f"{len(chosen) - alive} of {len(chosen)} killed")
    return alive


def main() -> int:
    """Parse the command line; return 1 if a mutant survives or does not apply."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1, help="mutants tried at once (default 1)")
    parser.add_argument("--only", metavar="TEXT", help="those whose name or file holds this")
    given = parser.parse_args()
    chosen = [each for each in mutants() if given.only is None or given.only in f"{each.name} {each.file}"]
    return 1 if not chosen or run(chosen, given.jobs) else 0


if __name__ == "__main__":
    sys.exit(main())
