"""`make bench`: measure every row and write the table into docs/explanation/benchmarks.md.

The table is printed too; the last line on stdout is one JSON object.

python -m benchmarks.run [--shape tiny] [--repeats 1] [--only base] [--json] [--page docs/explanation/benchmarks.md]
python -m benchmarks.run --only gpu --prepare    writes the models and experts that the rows need, and measures nothing
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from benchmarks import machine, page
from benchmarks.experiments.every import experiments
from benchmarks.experiments.experiment import Context, Experiment
from benchmarks.measure import ROOT
from benchmarks.rows import HEAD, Row
from benchmarks.shapes import SCALES
from benchmarks.world import Part, World, check_space

# A table that is no terminal's is not folded to 80 columns.
_WIDTH = 190


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the options ask for; 1 where a way failed."""
    options = _parser().parse_args(argv)
    scale = SCALES[options.shape]
    chosen = _chosen(experiments(scale), options.only)
    start, load = time.monotonic(), machine.load()
    context = Context(World.default(), scale, options.repeats, _say)
    if options.prepare:
        _prepare(context.world, chosen)
        os.sync()  # the first row would wait for it
        return 0
    described = machine.describe(context.world.folder)
    has_gpu = "gpu" in described
    rows = _rows(context, chosen, has_gpu=has_gpu)
    result = {
        "shape": options.shape,
        "repeats": options.repeats,
        "machine": {**described, **_copy_rates(options, has_gpu=has_gpu)},
        "load": [load, machine.load()],
        "seconds": round(time.monotonic() - start),
        "rows": [row.as_json() for row in rows],
    }
    if not options.json:
        print_table(rows)
    if options.page is not None or options.shape == "1b":
        for part in page.update(options.page or ROOT / "docs" / "explanation" / "benchmarks.md", result):
            _say(f"the table called {part} is written into the page")
    print(json.dumps(result, allow_nan=False), flush=True)
    return int(any(row.note.startswith("failed") for row in rows))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=sorted(SCALES), default="1b", help="1b: real shapes; tiny: a trial")
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes of each way")
    parser.add_argument("--only", action="append", help="a row or the first words of several, cpu, gpu, serving")
    parser.add_argument("--json", action="store_true", help="print the line of JSON alone")
    parser.add_argument("--no-copies", action="store_true", help="do not measure how fast memory is copied")
    parser.add_argument("--prepare", action="store_true", help="write the models and experts, measure nothing")
    parser.add_argument("--page", type=Path, help="where the tables go: docs/explanation/benchmarks.md")
    return parser


def _chosen(every: Sequence[Experiment], only: Sequence[str] | None) -> list[Experiment]:
    if only is None:
        return list(every)
    chosen = [each for each in every if any(_matches(row, word) for row in each.rows for word in only)]
    unknown = [word for word in only if not any(_matches(row, word) for each in every for row in each.rows)]
    if unknown:
        names = ", ".join(row.name for each in every for row in each.rows)
        raise SystemExit(f"error: no row is called {', '.join(unknown)}\n   at: --only\n mend: choose from {names}")
    return chosen


def _matches(row: Row, word: str) -> bool:
    return word in {row.name, row.part} or row.name.startswith(f"{word}-")


def _rows(context: Context, chosen: Sequence[Experiment], *, has_gpu: bool) -> list[Row]:
    able = [each for each in chosen if has_gpu or not each.needs_gpu]
    _prepare(context.world, able)
    rows = []
    for number, experiment in enumerate(chosen, start=1):
        if experiment not in able:
            rows += [replace(row, note="no GPU here") for row in experiment.rows]
            continue
        title = f"{number}/{len(chosen)} {experiment.rows[0].name}"
        inner = replace(context, say=lambda way, title=title: _say(f"{title}: {way}"))  # type: ignore[misc]
        rows += experiment.run(inner, {row.name: row for row in experiment.rows})
    return rows


def _prepare(world: World, chosen: Sequence[Experiment]) -> None:
    parts: list[Part] = list(dict.fromkeys(part for each in chosen for part in each.parts))
    needed, free = check_space(world, parts, max((each.scratch_bytes for each in chosen), default=0))
    _say(f"{world.folder}: {needed / 1e9:.1f} GB more are needed on the disk, {free / 1e9:.1f} GB are free")

    def build(part: Part) -> None:
        _say(f"write {part.shape.name}/{part.kind} ({part.num_bytes / 1e9:.2f} GB)")
        world.build(part)

    # random numbers come from one thread for each part
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(build, world.missing(parts)))


def _copy_rates(options: argparse.Namespace, *, has_gpu: bool) -> dict[str, str]:
    if options.no_copies:
        return {}
    return machine.copy_rates({**machine.ON_CPU, **(machine.ON_GPU if has_gpu else {})}, _say)


def print_table(rows: Sequence[Row]) -> None:
    """Print rows as a table, and their notes below it."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in HEAD:
        table.add_column(name, justify="right" if name in page.NUMBERS else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.cells)
    console = Console(markup=False, highlight=False)
    if not console.is_terminal:
        console = Console(markup=False, highlight=False, width=_WIDTH)
    console.print(table)
    for row in rows:
        if row.note:
            console.print(f"{row.name}: {row.note}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
