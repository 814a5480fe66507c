"""The only module that prints. Data goes to stdout. Errors, messages and progress bars go to stderr."""

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

# The minimum width of a text column. A table that needs narrower columns is printed row by row.
_LEAST_TEXT = 20
# Number of blanks in a line of a record: one at each end, and three between the two columns.
_FRAME = 5
# Seconds between two lines of progress if stderr is not a terminal (a log file, CI).
_LOG_SECONDS = 10.0


class Bar(Protocol):
    """A display of the progress of one task."""

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        """Show `done` as the number of finished units of work, and figures such as loss=0.31 after the bar."""


def show_error(error: SoupError) -> None:
    """Print an error on stderr: what is wrong, where, and the fix."""
    say(f"error: {error}")


def say(text: str) -> None:
    """Print a message on stderr, such as the state of a run or a next step."""
    print(text, file=sys.stderr, flush=True)


def show_text(text: str, *, end: str = "\n") -> None:
    """Print text on stdout and flush. For the pieces of a streamed answer, pass `end=""`."""
    print(text, end=end, flush=True)


def show_json(value: object) -> None:
    """Print a value as indented JSON on stdout.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON cannot express.
    """
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False), flush=True)


def show_line(value: object) -> None:
    """Print a value as one line of JSON on stdout."""
    print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)


def show_table(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]], *, title: str | None = None, as_json: bool = False
) -> None:
    """Print rows as a table. If `as_json` is true, print a JSON list of objects, whose keys are the columns."""
    if as_json:
        show_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    texts = [[_cell(value) for value in row] for row in rows]
    widths = _widths(columns, texts, shutil.get_terminal_size().columns)
    if widths is None:
        _show_stacked(columns, texts, title=title)
        return
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, (column, width) in enumerate(zip(columns, widths, strict=True)):
        numeric = bool(rows) and all(isinstance(row[index], int | float) for row in rows)
        table.add_column(column, justify="right" if numeric else "left", overflow="fold", width=width)
    for row in texts:
        table.add_row(*row)
    _print_rich(table)


def show_record(record: Mapping[str, Any], *, title: str | None = None, as_json: bool = False) -> None:
    """Print a mapping as a table of two columns. If `as_json` is true, print one JSON object."""
    if as_json:
        show_json(record)
        return
    _show_pairs([[(key, _cell(value)) for key, value in record.items()]], title=title)


def _widths(columns: Sequence[str], rows: Sequence[Sequence[str]], available: int) -> list[int] | None:
    """Return column widths that fit into `available` cells without breaking a word, or None if that is impossible.

    If the table is too wide, its headings are broken into lines. If that is not enough, its widest columns are
    narrowed.
    """
    cells = [[row[index] for row in rows] for index in range(len(columns))]
    room = available - 2 - 2 * (len(columns) - 1)  # a blank at each end, two between columns
    widths = [max(map(_longest_line, [column, *below])) for column, below in zip(columns, cells, strict=True)]
    if sum(widths) <= room:
        return widths
    widths = [
        max(_longest_word(column), *map(_longest_line, below), 0) for column, below in zip(columns, cells, strict=True)
    ]
    least = [
        max(_longest_word(column), *map(_longest_word, below), min(width, _LEAST_TEXT))
        for column, below, width in zip(columns, cells, widths, strict=True)
    ]
    if sum(least) > room:
        return None
    while sum(widths) > room:
        widest = max((index for index in range(len(widths)) if widths[index] > least[index]), key=widths.__getitem__)
        widths[widest] -= 1
    return widths


def _show_stacked(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None) -> None:
    """Print each row of a table as a separate record. Used if the table is too wide for the terminal."""
    names = [" ".join(column.split()) for column in columns]
    _show_pairs([list(zip(names, row, strict=True)) for row in rows], title=title)


def _show_pairs(records: Sequence[Sequence[tuple[str, str]]], *, title: str | None) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    keys = max((_longest_line(key) for record in records for key, _ in record), default=0)
    available = shutil.get_terminal_size().columns - keys - _FRAME
    wrapped = [[(key, _wrapped(value, available)) for key, value in record] for record in records]
    values = max((_longest_line(value) for record in wrapped for _, value in record), default=0)
    table = Table(title=title, title_justify="left", show_header=False, box=SIMPLE_HEAD, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    for number, record in enumerate(wrapped):
        if number:
            table.add_row("", "")
        for key, value in record:
            table.add_row(key, value)
    _print_rich(table, least=keys + values + _FRAME)


def _wrapped(text: str, width: int) -> str:
    """Break text between words into lines of at most `width` cells.

    A word longer than `width`, such as a path, is not broken, so that a user can copy it in one piece.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if _longest_line(line) <= width:
            lines.append(line)
            continue
        begun = ""
        for word in line.split():
            longer = f"{begun} {word}" if begun else word
            if begun and _longest_line(longer) > width:
                lines.append(begun)
                longer = word
            begun = longer
        lines.append(begun)
    return "\n".join(lines)


def _longest_line(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split("\n")), default=0)


def _longest_word(text: str) -> int:
    from rich.cells import cell_len

    return max(map(cell_len, text.split()), default=0)


@contextmanager
def progress(title: str, total: int | None = None, *, done: int = 0, quiet: bool = False) -> Iterator[Bar]:
    """Show a progress bar on stderr, or print a line every ten seconds if stderr is not a terminal.

    Args:
        title: the name of the task.
        total: the number of units of work, if known.
        done: the number of units that an earlier run finished. The estimate of the time left ignores these units.
        quiet: show nothing. Used for JSON output, and in every process of a distributed run except the first.
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
        # Only this column may be broken into lines, so that the other columns fit into a narrow terminal.
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
        self._start = self._last_line = time.monotonic()
        self._first: tuple[float, int] | None = None  # time and work of the first update

    def update(self, done: int, *, total: int | None = None, **figures: float | str) -> None:
        self._total = total or self._total
        now = time.monotonic()
        of = f"/{self._total}" if self._total else ""
        left = ""
        # What comes before the first update, such as loading a model, says nothing of the speed.
        since, begun = self._first or (self._start, self._before)
        if self._total and begun < done < self._total:
            left = f", {(now - since) / (done - begun) * (self._total - done):.0f} s left"
        if self._first is None and done > self._before:
            self._first = now, done
        self._line = f"{self._title}: {done}{of}{left}  {_figures(figures)}".rstrip()
        if now - self._last_line >= _LOG_SECONDS:
            self._last_line = now
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


def _print_rich(renderable: object, *, least: int = 0) -> None:
    """Print a rich table with the width of the terminal, but with at least `least` cells."""
    from rich.console import Console

    width = max(shutil.get_terminal_size().columns, least)
    # Markup is off, because a user's name such as `[a]` is not a style.
    Console(markup=False, highlight=False, width=width).print(renderable, crop=False)
