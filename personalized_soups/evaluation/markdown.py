"""Write Markdown: tables, and model output that is escaped so that readers see it unchanged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Characters with a special meaning inside a line of GitHub's Markdown or CommonMark. An underscore inside a word has
# no special meaning.
_SPECIAL = re.compile(r"([\\`*\[\]<>#|~$&]|(?<!\w)_|_(?!\w))")


def plain(text: str) -> str:
    """Return one line of Markdown that shows `text` unchanged. Line breaks become `<br>`."""
    return "<br>".join(_SPECIAL.sub(r"\\\1", line).strip() for line in text.strip().splitlines())


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = 1) -> str:
    """Return a Markdown table. The first `words` columns are aligned left, the other columns right.

    Cells are Markdown. They are padded, so that the columns line up in the source, too.

    Args:
        head: the heading of each column.
        rows: the cells of each row.
        words: the number of columns that hold words. The other columns hold numbers.
    """
    cells = [list(head), *map(list, rows)]
    widths = [max(3, *(len(row[column]) for row in cells)) for column in range(len(head))]
    rule = ["-" * width if at < words else "-" * (width - 1) + ":" for at, width in enumerate(widths)]
    lines = [[_padded(cell, widths[at], left=at < words) for at, cell in enumerate(row)] for row in cells]
    return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])


def _padded(cell: str, width: int, *, left: bool) -> str:
    return cell.ljust(width) if left else cell.rjust(width)
