"""The tables of docs/explanation/benchmarks.md, written between markers; what stands around them is written by hand.

python -m benchmarks.page RESULT.json    writes what another machine (one with a GPU) measured into the page
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.every import experiments
from benchmarks.measure import ROOT
from benchmarks.rows import HEAD, Row, shown
from benchmarks.shapes import SCALES
from personalized_soups.evaluation.markdown import plain, table

PARTS = ("cpu", "gpu", "serving")

# Columns that hold figures.
NUMBERS = ("ours", "theirs", "ratio")

_COLUMNS = ("row", "work", "against", *NUMBERS, "bar", "met", "spread")
_WORDS = 3


def update(path: Path, result: Mapping[str, Any]) -> list[str]:
    """Write the tables of a result into the page, and return the parts that were written.

    A part is written only where the result has every row of it. The GPU's rows are written without a GPU too, as long
    as the page has no figures of one: they say that they wait for it.

    Raises:
        SystemExit: if the page is not there or lacks its markers.
    """
    rows = [Row.from_json(row) for row in result["rows"]]
    every = experiments(SCALES[result["shape"]])
    written = []
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    for part in PARTS:
        of_part = [row for row in rows if row.part == part]
        expected = [row.name for each in every for row in each.rows if row.part == part]
        if [row.name for row in of_part] != expected:
            continue
        begin, end = f"<!-- {part}: begin -->\n", f"<!-- {part}: end -->"
        before, found, rest = text.partition(begin)
        block, closed, after = rest.partition(end)
        if not (found and closed):
            raise SystemExit(f"error: the page has no table called {part}\n   at: {path}\n mend: restore {begin}{end}")
        if all(row.ours is None for row in of_part) and "- processor:" in block:
            continue  # figures that another machine measured are not replaced by none
        text = before + begin + _block(result, of_part) + end + after
        written.append(part)
    if written:
        path.write_text(text, encoding="utf-8")
    return written


def _block(result: Mapping[str, Any], rows: Sequence[Row]) -> str:
    is_measured = any(row.ours is not None for row in rows)
    lines = _conditions(result) if is_measured else ["Not measured yet."]
    notes = [f"- {row.name}: {plain(row.note)}" for row in rows if row.note]
    cells = table(_COLUMNS, [_cells(row) for row in rows], words=_WORDS)
    return "\n".join([*lines, "", cells, "", *([*notes, ""] if notes else [])])


def _conditions(result: Mapping[str, Any]) -> list[str]:
    lines = [f"- {name}: {plain(words)}" for name, words in result["machine"].items()]
    before, after = result["load"]
    lines.append(f"- load average of the last minute: {before} before, {after} after")
    lines.append(f"- {result['repeats']} runs of each way, {result['seconds'] / 60:.0f} minutes in all")
    return lines


def _cells(row: Row) -> list[str]:
    values = dict(zip(HEAD, row.cells, strict=True))
    values["spread"] = "; ".join(f"{_short(low, row.unit)} to {_short(high, row.unit)}" for low, high in row.spread)
    return ["**no**" if name == "met" and row.is_met is False else plain(values[name]) for name in _COLUMNS]


def _short(value: float, unit: str) -> str:
    return shown(value, unit).split(" ")[0]


def main(argv: Sequence[str]) -> None:
    """Write the last line of a run's output into the page."""
    lines = Path(argv[0]).read_text(encoding="utf-8").strip().splitlines()
    result = json.loads(lines[-1])
    print(", ".join(update(ROOT / "docs" / "explanation" / "benchmarks.md", result)))


if __name__ == "__main__":
    main(sys.argv[1:])
