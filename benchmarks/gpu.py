"""`make gpu`: run the tests and the benchmark rows that need a GPU, and write the GPU part of docs/benchmarks.md.

python -m benchmarks.gpu [--only mixing-gpu] [--shape tiny] [--page docs/benchmarks.md]

The work is cut into stages. Each runs in a process group of its own with a time limit, so a stage that hangs loses its
own result and no other. A stage's limit is its share of the whole time plus what earlier stages left over; the shares
add up to less than six minutes. Nothing is installed: tests of packages that are missing are skipped, by name. The last
line on stdout is one JSON object with every stage and every row.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Literal

from benchmarks import page
from benchmarks.experiments.every import experiments
from benchmarks.experiments.experiment import Experiment
from benchmarks.measure import ROOT
from benchmarks.rows import Row
from benchmarks.run import print_table
from benchmarks.shapes import SCALES, Scale

State = Literal["passed", "failed", "timed out"]

TESTS = ROOT / "tests"

# Kernels are compiled ahead of time for several kinds of GPU, which needs none: all tests of this folder are run.
KERNELS = "tests/kernels"

# The mark in a test's source.
MARK = re.compile(r"\bmark\.gpu\b")

# Seconds. The rest of the six minutes is for this process: imports, and the page.
TOTAL_SECONDS = 350
_CARD_SECONDS = 20
_INPUT_SECONDS = 30
_KERNEL_SECONDS = 40
_TEST_SECONDS = 60  # of all folders together


@dataclass(frozen=True, slots=True)
class Share:
    """What one experiment gets: seconds, and how many fresh processes of each way fit into them."""

    seconds: float
    repeats: int


_SHARES = {
    "base-gpu": Share(25, 1),  # reads and writes 2 GB in each run
    "many-gpu": Share(20, 1),
    "many-gpu-arithmetic": Share(20, 2),
    "live-free-gpu": Share(25, 2),
    "live-shared-gpu": Share(25, 2),
    "mixing-gpu": Share(85, 1),  # compiles a model of 32 layers into CUDA graphs, ours and the bare one
}
_DEFAULT_SHARE = Share(20, 1)

# Other versions of the libraries warn of other things, so warnings are not errors here.
PYTEST = ("-m", "pytest", "-q", "-rs", "-W", "default", "-p", "no:cacheprovider")

_TAIL_LINES = 25


@dataclass(frozen=True, slots=True)
class Stage:
    """A command with a time limit.

    Args:
        name: shown in progress lines.
        arguments: of the Python interpreter.
        seconds: the stage's share of the whole time.
        rows: benchmark rows that the command measures.
    """

    name: str
    arguments: tuple[str, ...]
    seconds: float
    rows: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a stage.

    Args:
        name: the stage's.
        state: a stage passes if its command returns 0 in time.
        seconds: how long it ran.
        limit: how long it might have run.
        counts: tests by result: passed, failed, skipped, ...
        skipped: why tests were skipped.
        report: the JSON object that the command printed last.
        output: the last lines that the command printed.
    """

    name: str
    state: State
    seconds: float
    limit: float
    counts: Mapping[str, int] = field(default_factory=dict)
    skipped: Sequence[str] = ()
    report: Mapping[str, Any] = field(default_factory=dict)
    output: Sequence[str] = ()

    @property
    def reason(self) -> str:
        """Why a stage has no result."""
        if self.state == "timed out":
            return f"no result within {self.limit:.0f} s"
        return next((line.strip() for line in reversed(self.output) if line.strip()), "no output")

    def as_json(self) -> dict[str, Any]:
        """Return what is kept in the result; the rows have a place of their own."""
        return {key: value for key, value in asdict(self).items() if key not in {"report", "output"}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 if all passed, 1 if one did not, 2 if there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SCALES), default="1b", help="1b: real shapes; tiny: a trial")
    parser.add_argument(
        "--only",
        action="append",
        metavar="STAGE",
        help="run this stage alone, and leave the page as it is; may be repeated",
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "benchmarks.md", help="page to write the table to")
    options = parser.parse_args(argv)
    if fault := missing_card():
        print(fault, file=sys.stderr)
        return 2
    scale = SCALES[options.shape]
    start, load = time.monotonic(), os.getloadavg()[0]
    outcomes = run_stages(_chosen(stages(scale, options.shape), options.only))
    rows = gather_rows(scale, outcomes)
    result = {
        "shape": options.shape,
        "repeats": " or ".join(map(str, sorted({_share(each).repeats for each in gpu_experiments(scale)}))),
        "machine": next((dict(outcome.report) for outcome in outcomes if outcome.name == "card"), {}),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "seconds": round(time.monotonic() - start),
        "rows": [row.as_json() for row in rows],
        "stages": [outcome.as_json() for outcome in outcomes],
    }
    # a run of some stages has no figures for the other rows, and the page may have
    _finish(result, rows, outcomes, options.page if options.only is None else None)
    failed = [outcome.name for outcome in outcomes if outcome.state != "passed"]
    return int(bool(failed) or any(row.note.startswith("failed") for row in rows))


def missing_card() -> str | None:
    """Return the error message for a machine on which nothing can run; None if PyTorch finds a GPU."""
    try:
        import torch
    except ModuleNotFoundError:
        return (
            f"error: PyTorch is not installed\n   at: {sys.executable}\n"
            " mend: make gpu PYTHON=... with an interpreter that has torch, transformers and peft"
        )
    if torch.cuda.is_available():
        return None
    return (
        f"error: PyTorch {torch.__version__} finds no CUDA device\n   at: {sys.executable}\n"
        " mend: run `make gpu` on a machine with an NVIDIA GPU and a CUDA build of PyTorch"
    )


def stages(scale: Scale, shape: str) -> list[Stage]:
    """Return all stages in order; the one that needs most time is last and gets what the others left over."""
    folders = [folder for folder in gpu_tests() if folder != KERNELS]
    found = [
        Stage("card", ("-m", "benchmarks.machine"), _CARD_SECONDS),
        Stage("inputs", ("-m", "benchmarks.run", "--shape", shape, "--only", "gpu", "--prepare"), _INPUT_SECONDS),
    ]
    if any((ROOT / KERNELS).rglob("test_*.py")):
        found.append(Stage(KERNELS, (*PYTEST, "-m", "gpu or not gpu", KERNELS), _KERNEL_SECONDS))
    found += [Stage(folder, (*PYTEST, "-m", "gpu", folder), _TEST_SECONDS / len(folders)) for folder in folders]
    for experiment in sorted(gpu_experiments(scale), key=lambda each: _share(each).seconds):
        names = tuple(row.name for row in experiment.rows)
        share = _share(experiment)
        options = ("--shape", shape, "--only", names[0], "--repeats", str(share.repeats), "--no-copies", "--json")
        found.append(Stage(names[0], ("-m", "benchmarks.run", *options), share.seconds, names))
    return found


def gpu_experiments(scale: Scale) -> list[Experiment]:
    """Return the experiments that need a GPU."""
    return [each for each in experiments(scale) if each.needs_gpu]


def gpu_tests(tests: Path = TESTS) -> list[str]:
    """Return the folders directly below `tests` that mark a test as one for a GPU, and files that stand beside them.

    Whole folders, not files: a conftest or a helper module may mark the tests of others.
    """
    marked = {
        file.relative_to(tests).parts[0]
        for file in tests.rglob("*.py")
        if MARK.search(file.read_text(encoding="utf-8"))
    }
    return [f"{tests.name}/{name}" for name in sorted(marked)]


def run_stages(chosen: Sequence[Stage]) -> list[Outcome]:
    """Run stages one after another."""
    outcomes = []
    spare = 0.0
    for number, stage in enumerate(chosen, start=1):
        limit = stage.seconds + spare
        place = f"{number}/{len(chosen)} {stage.name}"
        say(f"{place}: at most {limit:.0f} s")
        outcome = run_stage(stage, limit)
        spare = max(0.0, limit - outcome.seconds)
        _say_outcome(place, outcome)
        outcomes.append(outcome)
    return outcomes


def run_stage(stage: Stage, limit: float) -> Outcome:
    """Run one stage; at its time limit, kill its processes."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
        "PYTHONUNBUFFERED": "1",  # a killed process keeps no lines back
    }
    start = time.monotonic()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, *stage.arguments],
            stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=ROOT, env=environment, start_new_session=True,
        )  # fmt: skip
        state: State = "failed"
        try:
            state = "passed" if process.wait(limit) == 0 else "failed"
        except subprocess.TimeoutExpired:
            state = "timed out"
        finally:
            kill_group(process)
        seconds = time.monotonic() - start
        printed, complaints = _lines(out), _lines(err)
    report = _last_object(printed)
    output = [*(printed if report is None else printed[:-1]), *complaints][-_TAIL_LINES:]
    counts, skipped = _counts(printed), _skipped(printed)
    return Outcome(stage.name, state, round(seconds, 1), round(limit, 1), counts, skipped, report or {}, output)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """Kill a process that leads a group, and all that it started and left running."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def gather_rows(scale: Scale, outcomes: Sequence[Outcome]) -> list[Row]:
    """Return every GPU row in the order of the page: as it was measured, or with a note why it was not."""
    measured = {row["name"]: Row.from_json(row) for outcome in outcomes for row in outcome.report.get("rows", ())}
    reasons = {outcome.name: outcome.reason for outcome in outcomes}
    rows = []
    for experiment in gpu_experiments(scale):
        reason = reasons.get(experiment.rows[0].name)
        note = "not run" if reason is None else f"failed: {reason}"
        rows += [measured.get(row.name, replace(row, note=note)) for row in experiment.rows]
    return rows


def say(text: str) -> None:
    """Print a line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def _say_outcome(place: str, outcome: Outcome) -> None:
    counts = "".join(f", {count} {name}" for name, count in outcome.counts.items())
    say(f"{place}: {outcome.state} in {outcome.seconds:.1f} s{counts}")
    if card := outcome.report.get("gpu"):
        say(f"GPU: {card}")
    for line in outcome.skipped:
        say(f"    skipped: {line}")
    if outcome.state != "passed":
        for line in outcome.output:
            say(f"    {line}")


def _finish(result: Mapping[str, Any], rows: Sequence[Row], outcomes: Sequence[Outcome], path: Path | None) -> None:
    print_table(rows)
    for part in page.update(path, result) if path is not None else []:
        say(f"{path}: the {part} table is written")
    reasons = [line for outcome in outcomes for line in outcome.skipped]
    missing = sorted({match[1] for line in reasons if (match := re.search(r"(\S+) is not installed", line))})
    if missing:
        say(f"tests were skipped because these packages are not installed: {', '.join(missing)}")
    for outcome in outcomes:
        if outcome.state != "passed":
            say(f"{outcome.name}: {outcome.state}: {outcome.reason}")
    print(json.dumps(result, allow_nan=False), flush=True)


def _chosen(every: Sequence[Stage], only: Sequence[str] | None) -> list[Stage]:
    names = {stage.name for stage in every}
    if unknown := sorted(set(only or ()) - names):
        raise SystemExit(
            f"error: no stage is called {', '.join(unknown)}\n   at: --only\n mend: choose from {', '.join(names)}"
        )
    return [stage for stage in every if only is None or stage.name in {"card", *only}]


def _share(experiment: Experiment) -> Share:
    return _SHARES.get(experiment.rows[0].name, _DEFAULT_SHARE)


def _counts(lines: Sequence[str]) -> dict[str, int]:
    """Return the numbers in pytest's last line: `2 passed, 1 skipped in 3.14s`."""
    for line in reversed(lines):
        if re.search(r" in \d+(\.\d+)?s\b", line):
            return {name: int(count) for count, name in re.findall(r"(\d+) ([a-z]+)", line)}
    return {}


def _skipped(lines: Sequence[str]) -> list[str]:
    """Return what pytest's summary says of skipped tests: file and reason."""
    return [match[1] for line in lines if (match := re.match(r"SKIPPED \[\d+\] (.+)", line))]


def _lines(stream: IO[bytes]) -> list[str]:
    stream.seek(0)
    return stream.read().decode(errors="replace").splitlines()


def _last_object(lines: Sequence[str]) -> dict[str, Any] | None:
    try:
        value = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


if __name__ == "__main__":
    sys.exit(main())
