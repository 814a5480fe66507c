"""The only file that prints. Data goes to stdout; errors, talk and progress bars go to stderr."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from personalized_soups.errors import SoupError

Cell = str | int | float | bool | None

# A column of no longer cells is not broken into lines; its neighbours give way.
_SHORT = 34
# Between two lines of progress where stderr is no terminal (a log file, CI).
_LOG_SECONDS = 10.0


class Bar(Protocol):
    """What a running task tells of itself."""

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        """Say that `done` units of work are done; figures such as loss=0.31 are shown beside the bar."""


def show_error(error: SoupError) -> None:
    """Print what is wrong, where, and the mend, on stderr."""
    say(f"error: {error}")


def say(text: str) -> None:
    """Print talk (what is going on, what to try next) on stderr."""
    print(text, file=sys.stderr, flush=True)


def show_text(text: str, *, end: str = "\n") -> None:
    """Print data as it is on stdout, at once: pieces of a streamed answer have `end=""`."""
    print(text, end=end, flush=True)


def show_json(value: object) -> None:
    """Print one JSON object on stdout; numbers that JSON does not have (NaN, Inf) are a bug and raise ValueError."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def show_line(value: object) -> None:
    """Print one JSON object on one line of stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, title: str | None = None, as_json: bool = False
) -> None:
    """Print rows as a table, or as one JSON list of objects keyed by column."""
    if as_json:
        show_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    widths = [max((len(_cell(row[index])) for row in rows), default=0) for index in range(len(columns))]
    # what cannot be wrapped is cut off where all of it is wider than the terminal
    fits = sum(min(width, _SHORT) + 2 for width in widths) <= shutil.get_terminal_size().columns
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        keeps = fits and widths[index] <= _SHORT
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", no_wrap=keeps)
    for row in rows:
        table.add_row(*(_cell(value) for value in row))
    _print_rich(table)


def show_record(record: Mapping[str, Any], *, title: str | None = None, as_json: bool = False) -> None:
    """Print one thing, key by key, as a table of two columns or as one JSON object."""
    if as_json:
        show_json(record)
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(overflow="fold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in record.items():
        table.add_row(key, _cell(value))
    _print_rich(table)


@contextmanager
def progress(title: str, total: int | None = None, *, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """Show a progress bar with the time left on stderr; a line now and then where stderr is no terminal.

    Args:
        title: what is going on.
        total: units of work in all, where known.
        done: units that were done before: they say nothing of the time that the others take.
        quiet: show nothing (other processes than the first of a distributed run).
    """
    if quiet:
        yield _NoBar()
        return
    if not sys.stderr.isatty():
        log = _LogBar(title, total, done)
        yield log
        log.finish()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Column

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        # the only column that may break into lines: on a narrow terminal the others stay whole
        TextColumn("{task.fields[figures]}", markup=False, table_column=Column(no_wrap=False)),
        console=Console(stderr=True),
    )
    with bar:
        yield _RichBar(bar, bar.add_task(title, total=total, completed=done, figures=""))


class _NoBar:
    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        pass


class _LogBar:
    def __init__(self, title: str, total: int | None, before: int = 0) -> None:
        self._title, self._total, self._before, self._line = title, total, before, ""
        self._start = self._told = time.monotonic()

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        self._total = total or self._total
        now = time.monotonic()
        of = f"/{self._total}" if self._total else ""
        left = ""
        if self._total and self._before < done < self._total:
            left = f", {(now - self._start) / (done - self._before) * (self._total - done):.0f} s left"
        self._line = f"{self._title}: {done}{of}{left}  {_figures(figures)}".rstrip()
        if now - self._told >= _LOG_SECONDS:
            self._told = now
            say(self._line)

    def finish(self) -> None:
        say(f"{self._line or self._title} ({time.monotonic() - self._start:.1f} s)")


class _RichBar:
    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        if total is not None:
            self._bar.update(self._task, total=total)
        self._bar.update(self._task, completed=done, figures=_figures(figures))


def _figures(figures: Mapping[str, float | str]) -> str:
    return "  ".join(
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
    )


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {_cell(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_cell(inner) for inner in value)
    return str(value)


def _print_rich(renderable: object) -> None:
    from rich.console import Console

    # markup off: names such as `[a]` are the user's own, not styles
    Console(markup=False, highlight=False).print(renderable)
