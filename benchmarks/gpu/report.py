"""Run the stages, and gather what they measured into the table and the page."""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import page
from benchmarks.gpu.plan import gpu_experiments, share_of, stages
from benchmarks.gpu.stages import Outcome, Stage, run_stages, say
from benchmarks.measure import ROOT
from benchmarks.rows import Row
from benchmarks.run import print_table
from benchmarks.shapes import SCALES, Scale


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages; return 0 if all passed, 1 if one did not."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Run what needs a GPU.")
    parser.add_argument("--shape", choices=sorted(SCALES), default="1b", help="1b: real shapes; tiny: a trial")
    parser.add_argument(
        "--only",
        action="append",
        metavar="STAGE",
        help="run this stage alone, and leave the page as it is; may be repeated",
    )
    parser.add_argument(
        "--page", type=Path, default=ROOT / "docs" / "explanation" / "benchmarks.md", help="page to write the table to"
    )
    options = parser.parse_args(argv)
    scale = SCALES[options.shape]
    start, load = time.monotonic(), os.getloadavg()[0]
    outcomes = run_stages(_chosen(stages(scale, options.shape), options.only))
    rows = gather_rows(scale, outcomes)
    result = {
        "shape": options.shape,
        "repeats": " or ".join(map(str, sorted({share_of(each).repeats for each in gpu_experiments(scale)}))),
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
