"""Fenced blocks of the pages, as the tests of this folder run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"

_FENCE = re.compile(r"^(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=fence)\s*$", re.MULTILINE | re.DOTALL)
_CAPTION = re.compile(r"\A:caption: (?P<name>\S+)\n")


class Block(NamedTuple):
    """One fenced block.

    Attributes:
        kind: the language, or the directive's argument.
        text: the lines between the fences, without the caption.
        caption: the name of the file that the block shows, if it shows one.
        line: the number of the opening fence's line.
    """

    kind: str
    text: str
    caption: str | None
    line: int


def blocks(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a Markdown page."""
    source = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(source):
        body = match["body"]
        caption = _CAPTION.match(body)
        yield Block(
            match["info"].split()[-1] if match["info"].strip() else "",
            body[caption.end() :] if caption else body,
            caption["name"] if caption else None,
            source.count("\n", 0, match.start()) + 1,
        )
