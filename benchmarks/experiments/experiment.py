"""What every experiment has: rows to fill, the parts of the world that it reads, and how figures become a row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from benchmarks.measure import Run, Way, WayError, measure, median, run_process, script
from benchmarks.rows import Row, spread
from benchmarks.shapes import Scale
from benchmarks.world import Part, World

# The figures of one way, a number for each of its runs; or why there are none.
Figures = Sequence[float] | Exception

# Units of which more is better.
RATES = frozenset({"GB/s", "tok/s"})


@dataclass(frozen=True, slots=True)
class Context:
    """Where, at which shapes and how often to measure; `say` reports progress."""

    world: World
    scale: Scale
    repeats: int
    say: Callable[[str], None]

    def measure(self, *ways: Way, after: Callable[[str, Path], None] | None = None) -> dict[str, list[Run] | Exception]:
        """Run the ways in turns, as `measure` does."""
        return measure(ways, self.repeats, self.world.outputs, after=after, progress=self.say)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Ways that are measured together.

    Args:
        rows: what it fills, without figures.
        run: fills them.
        parts: what has to be built before.
        scratch_bytes: what its largest output takes on the disk.
        needs_gpu: whether it says nothing without one.
    """

    rows: tuple[Row, ...]
    run: Callable[[Context, Mapping[str, Row]], Iterable[Row]]
    parts: tuple[Part, ...]
    scratch_bytes: int
    needs_gpu: bool = False


def spans(runs: list[Run] | Exception) -> Figures:
    """Return the seconds of each run without imports."""
    return runs if isinstance(runs, Exception) else [run.seconds for run in runs]


def processes(runs: list[Run] | Exception) -> Figures:
    """Return the seconds of each run's whole process."""
    return runs if isinstance(runs, Exception) else [run.process_s for run in runs]


def megabytes(runs: list[Run] | Exception) -> Figures:
    """Return the most anonymous memory of each run, in MB."""
    return runs if isinstance(runs, Exception) else [run.anon_bytes / 1e6 for run in runs]


def rates(runs: list[Run] | Exception) -> Figures:
    """Return GB/s of each run."""
    return runs if isinstance(runs, Exception) else [run.report["bytes_per_second"] / 1e9 for run in runs]


def scaled(figures: Figures, factor: float) -> Figures:
    """Return the figures times a factor."""
    return figures if isinstance(figures, Exception) else [figure * factor for figure in figures]


def best(*ways: Figures) -> Figures:
    """Return the figures of the way with the highest median, leaving out those that have none."""
    there = [figures for figures in ways if not isinstance(figures, Exception)]
    return max(there, key=median) if there else ways[0]


def filled(row: Row, ours: Figures, theirs: Figures | None = None) -> Row:
    """Return the row with the medians of both and their ratio, or with the reason why they are not there.

    The ratio says how many times better we are where the bar is `at least`, how many times worse where it is
    `at most`; rows without a bar are read as `at most`. Higher is better of rates, lower of all else.
    """
    notes = [row.note] if row.note else []
    figures = []
    for each in (ours, theirs):
        if isinstance(each, Exception):
            notes.append(f"failed: {each}" if isinstance(each, WayError) else str(each))
        figures.append(None if each is None or isinstance(each, Exception) else median(each))
    mine, other = figures
    ratio = None
    if mine is not None and other is not None:
        wants_speedup = row.bar is not None and row.bar.kind == "at least" and row.unit not in RATES
        ratio = other / mine if wants_speedup else mine / other
    runs = [each for each in (ours, theirs) if each is not None and not isinstance(each, Exception)]
    return replace(row, ours=mine, theirs=other, ratio=ratio, note="; ".join(notes), spread=spread(*runs))


class Agreement:
    """Compares the first output of some ways with float64, as they come by.

    Args:
        arguments: of the script, for each way that is compared; `out` is added.
    """

    def __init__(self, arguments: Mapping[str, Mapping[str, object]]) -> None:
        self._arguments = arguments
        self._found: dict[str, float] = {}

    def __call__(self, way: str, out: Path) -> None:
        """Compare one way's output."""
        if way in self._arguments:
            arguments = {"out": out, **self._arguments[way]}
            if subfolder := arguments.pop("subfolder", None):
                arguments["out"] = out / str(subfolder)
            self._found[way] = float(run_process(script("agreement", **arguments)).report["error"])

    def of(self, way: str, runs: list[Run] | Exception) -> Figures:
        """Return a way's error, or why it has none."""
        if way in self._found:
            return [self._found[way]]
        return runs if isinstance(runs, Exception) else WayError("its output was not compared")
