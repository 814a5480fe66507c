"""Commands with time limits, run one after another, each in a process group of its own."""

from __future__ import annotations

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
from dataclasses import asdict, dataclass, field
from typing import IO, Any, Literal

from benchmarks.measure import ROOT

State = Literal["passed", "failed", "timed out"]

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
