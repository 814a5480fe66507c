"""A report as a list of parts, written as Markdown or as one HTML page that needs no other file and no network."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TypeAlias

from personalized_soups.evaluation.markdown import plain, table


@dataclass(frozen=True, slots=True)
class Heading:
    """The heading of a section. Level 1 is the title of the page."""

    text: str
    level: int = 2


@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph of plain text. An important one is shown first in a box."""

    text: str
    is_important: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table of plain texts. The first `words` columns are aligned left, the others, which hold numbers, right."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: int = 1


@dataclass(frozen=True, slots=True)
class Picture:
    """A PNG file in the folder of the report, and what it shows."""

    path: Path
    caption: str


@dataclass(frozen=True, slots=True)
class Sample:
    """The answer of one system to one prompt."""

    prompt: str
    combination: str
    system: str
    answer: str
    is_valid: bool


@dataclass(frozen=True, slots=True)
class Samples:
    """Answers side by side. The HTML page shows those of one prompt and one combination, which the reader chooses."""

    samples: Sequence[Sample]


Part: TypeAlias = Heading | Paragraph | Table | Picture | Samples


def as_markdown(parts: Sequence[Part]) -> str:
    """Return the report as Markdown. Pictures are links to files, and of the samples only the first prompt is shown."""
    return "\n\n".join(text for part in parts for text in _markdown(part)) + "\n"


def as_html(parts: Sequence[Part]) -> str:
    """Return the report as an HTML page with its pictures, style and script inside.

    Raises:
        OSError: if a picture cannot be read.
    """
    title = next((part.text for part in parts if isinstance(part, Heading)), "Report")
    body = "\n".join(text for part in parts for text in _html(part))
    folder = files("personalized_soups.evaluation")
    style, script = (folder.joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n"
        f"<script>\n{script}</script>\n</body>\n</html>\n"
    )


def _markdown(part: Part) -> Iterator[str]:
    match part:
        case Heading():
            yield f"{'#' * part.level} {plain(part.text)}"
        case Paragraph():
            yield f"**{plain(part.text)}**" if part.is_important else plain(part.text)
        case Table():
            yield table(list(map(plain, part.head)), [list(map(plain, row)) for row in part.rows], words=part.words)
        case Picture():
            yield f"![{plain(part.caption)}]({part.path.name})"
        case Samples():
            first = [sample for sample in part.samples if sample.prompt == part.samples[0].prompt]
            rows = [[plain(sample.combination), plain(sample.system), plain(sample.answer)] for sample in first]
            yield f"Prompt: {plain(first[0].prompt)}" if first else ""
            yield table(["combination", "system", "answer"], rows, words=3)


def _html(part: Part) -> Iterator[str]:
    match part:
        case Heading():
            yield f"<h{part.level}>{html.escape(part.text)}</h{part.level}>"
        case Paragraph():
            kind = ' class="important"' if part.is_important else ""
            yield f"<p{kind}>{html.escape(part.text)}</p>"
        case Table():
            yield _html_table(part)
        case Picture():
            content = base64.b64encode(part.path.read_bytes()).decode()
            text = html.escape(part.caption)
            yield f'<figure><img alt="{text}" src="data:image/png;base64,{content}"><figcaption>{text}</figcaption>'
            yield "</figure>"
        case Samples():
            yield from _html_samples(part.samples)


def _html_table(part: Table) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        kinds = ["" if at < part.words else ' class="number"' for at in range(len(row))]
        return "".join(f"<{tag}{kind}>{html.escape(cell)}</{tag}>" for kind, cell in zip(kinds, row, strict=True))

    rows = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in part.rows)
    head = f"<thead><tr>{cells(part.head, 'th')}</tr></thead>"
    return f'<div class="wide" tabindex="0"><table>{head}\n<tbody>\n{rows}\n</tbody></table></div>'


def _html_samples(samples: Sequence[Sample]) -> Iterator[str]:
    for name, label, values in (
        ("prompt", "Prompt", [sample.prompt for sample in samples]),
        ("combination", "Preferences", [sample.combination for sample in samples]),
    ):
        options = "".join(f"<option>{html.escape(value)}</option>" for value in dict.fromkeys(values))
        yield f'<label class="filter">{label} <select data-filter="{name}">{options}</select></label>'
    yield '<label class="filter">Search <input type="search" data-filter="text" placeholder="words"></label>'
    yield '<div class="samples">'
    for sample in samples:
        prompt, combination = html.escape(sample.prompt), html.escape(sample.combination)
        note = "" if sample.is_valid else ' <span class="invalid">invalid</span>'
        yield (
            f'<article data-prompt="{prompt}" data-combination="{combination}">'
            f"<h4>{html.escape(sample.system)}{note}</h4><p>{html.escape(sample.answer)}</p></article>"
        )
    yield '</div><p class="none" hidden>No answer has these words.</p>'
