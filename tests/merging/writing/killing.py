"""A program that runs `psoups merge` in forked processes, kills them, and prints the state of the disk.

The package is imported once; each run is a fork of that, so that a kill lands in the work and not in the imports.
test_kills.py writes the experts, starts this and judges what it prints, a line a kill.
"""

# ruff: noqa: T201 # it prints for the test that started it

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import personalized_soups.merging.writing.into_base
import personalized_soups.merging.writing.many  # noqa: F401 # so that the forks need not
from personalized_soups.cli.app import build_app

OLD, NEW = "a=0.5,b=0.25", "a=0.7,b=-0.4,c=1.1"


def command(kind: str, root: Path, out: Path, weights: str = NEW) -> list[str]:
    """Return the arguments of a run of that kind; `root` holds experts, base and profiles."""
    experts = ["--experts", str(root / "experts"), "--out", str(out)]
    if kind == "many":
        return ["merge-many", str(root / "users.jsonl"), *experts, "--json"]
    more = {"adapter": [], "overwrite": ["--overwrite"], "model": ["--into-base", str(root / "base")]}[kind]
    return ["merge", "--weights", weights, *experts, *more, "--json"]


def forked(arguments: Sequence[str], log: Path, start: float = 0.0) -> int:
    """Start psoups in a forked process at the time `start`, with its output in `log`; return the process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(descriptor, stream)
        while time.monotonic() < start:
            pass
        build_app()(list(arguments), prog_name="psoups")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 0
    finally:
        sys.stderr.flush()
        os._exit(code)


def code_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(arguments: Sequence[str], log: Path) -> int:
    return code_of(forked(arguments, log))


def state(out: Path) -> dict[str, str]:
    """Return the digest of each finished folder's content: of `out`, or of the users' folders in it."""
    found = {}
    for folder in [out, *out.glob("*")] if out.is_dir() else []:
        if (folder / "soup.json").exists() or any(folder.glob("*.safetensors")):
            digest = hashlib.sha256()
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                digest.update(json.dumps([path.relative_to(folder).as_posix(), path.stat().st_size]).encode())
                digest.update(path.read_bytes())
            found[folder.relative_to(out).as_posix()] = digest.hexdigest()
    return found


def litter(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if "partial" in path.name)


def wait_for_begin(child: int, out: Path) -> None:
    """Wait until a run has begun to write (for many users: the first folder), or has ended."""
    # the folder in the scratch folder is made once that is locked
    while not any(out.parent.glob(f".{out.name}.partial/new")) and not any(out.glob(".*.partial/new")):
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
            return
        time.sleep(0.0002)


def kill_many(kind: str, root: Path, count: int) -> None:
    """Print the result of complete runs, then the results of `count` killed runs and of the runs after them.

    Half are killed at a random moment of their writing, a quarter as it begins, a quarter before it.
    """
    log = root / "log"
    before, writing = [], []
    for number in range(3):
        began = time.monotonic()
        out = root / f"whole{number}"
        child = forked(command(kind, root, out), log)
        wait_for_begin(child, out)
        before.append(time.monotonic() - began)
        assert code_of(child) == 0, log.read_text()
        writing.append(time.monotonic() - began - before[-1])
    run(command("adapter", root, root / "before", OLD), log)
    print(json.dumps({"whole": state(root / "whole0"), "before": state(root / "before")}), flush=True)
    dice = random.Random(kind)
    for number in range(count):
        folder = root / f"run{number}"
        folder.mkdir()
        arguments = command(kind, root, folder / "out")
        if kind == "overwrite":
            assert run(command("adapter", root, folder / "out", OLD), log) == 0
        child = forked(arguments, log)
        if number % 4:
            wait_for_begin(child, folder / "out")
            if number % 4 > 1:  # the others are killed at the very beginning
                time.sleep(dice.uniform(0, 1.1) * statistics.median(writing))
        else:
            time.sleep(dice.uniform(0, 1) * statistics.median(before))
        os.kill(child, signal.SIGKILL)
        found = {"code": code_of(child), "after_kill": state(folder / "out"), "litter": litter(folder)}
        found |= {"again": run(arguments, log), "log": log.read_text()}
        found |= {"after_rerun": state(folder / "out"), "left": sorted(path.name for path in folder.iterdir())}
        print(json.dumps(found | {"litter_after": litter(folder)}), flush=True)


def race(kind: str, root: Path, count: int) -> None:
    """Start two runs at the same time, `count` times, and print how each ended."""
    for number in range(count):
        folder = root / f"race{number}"
        folder.mkdir()
        arguments = command(kind, root, folder / "out")
        start = time.monotonic() + 0.02
        children = [forked(arguments, folder / f"log{each}", start) for each in range(2)]
        print_ends(folder, [code_of(child) for child in children])


def meet(kind: str, root: Path, count: int) -> None:
    """Stop a run while it writes, start another, then resume the first; print how each ended."""
    for number in range(count):
        folder = root / f"meet{number}"
        folder.mkdir()
        arguments = command(kind, root, folder / "out")
        first = forked(arguments, folder / "log0")
        wait_for_begin(first, folder / "out")
        os.kill(first, signal.SIGSTOP)
        second = run(arguments, folder / "log1")
        os.kill(first, signal.SIGCONT)
        print_ends(folder, [code_of(first), second])


def print_ends(folder: Path, codes: list[int]) -> None:
    logs = [(folder / f"log{each}").read_text() for each in range(2)]
    found = {"codes": codes, "log": logs, "after": state(folder / "out"), "litter": litter(folder)}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    {"kill": kill_many, "race": race, "meet": meet}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
