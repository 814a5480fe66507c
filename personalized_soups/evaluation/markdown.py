"""Markdown from values: tables, and text that a model wrote, shown as it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# What GitHub and CommonMark give a meaning to inside a line; a model may write any of it.
# An underscore inside a word means nothing.
_SPECIAL = re.compile(r"([\\`*\[\]<>#|~$&]|(?<!\w)_|_(?!\w))")


def plain(text: str) -> str:
    """Return Markdown that shows `text` as it is, in one line: special characters escaped, line breaks as `<br>`."""
    return "<br>".join(_SPECIAL.sub(r"\\\1", line).strip() for line in text.strip().splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Return a table whose first `words` columns are aligned left and the others, numbers, right.

    Cells are Markdown already. Columns are padded, so that the source reads as well as what is made from it.
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    rule = ["-" * width if at < words else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    lines = [[_padded(cell, widths[at], left=at < words) for at, cell in enumerate(row)] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _padded(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
