"""Divide an answer into sentences: an answer of a language model has lists and headings, and may be cut at a limit."""

from __future__ import annotations

import re

# A line that begins a list item: "1.", "2)", "-", "*" or "•".
_ITEM = re.compile(r"\s*(?:\(?\d{1,3}[.)]|[-*+\u2022])\s+")
# A line of its own that is a heading: "# Title" or "**Title**", with or without a number before it.
_HEADING = re.compile(r"\s*(?:\d{1,3}[.)]\s+)?(?:#{1,6}\s+\S.*|\*\*[^*]+\*\*:?|__[^_]+__:?)\s*")
_EMPHASIS = re.compile(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)")
# The end of a sentence: marks, with closing quotes and brackets. The text goes on after white space, or ends.
_END = re.compile(r"[.!?\u2026]+[\"'\u201d\u2019)\]]*(?=\s|$)")
# The number of a list item that begins within a line: "Two ideas. 1. Read." has no sentence "1."
_NUMBER = re.compile(r"\d{1,3}\.")
_ABBREVIATION = re.compile(r"(?:^|[\s(])(?:Dr|Mr|Mrs|Ms|St|vs|e\.g|i\.e)\.$")
# A list item or a whole answer of at most as many words may end without a mark: "3. A scarf", "Paris".
_SHORT = 8


def blocks_of(text: str) -> list[str]:
    """Return the paragraphs, list items and headings of a text, without the marks of list items and emphasis.

    A line break within a paragraph becomes a space. A heading keeps its marks, so that `is_heading` recognises it.

    Example:
        >>> blocks_of("Two ideas:\\n1. **Read** a\\nbook.\\n2. Sleep.")
        ['Two ideas:', 'Read a book.', 'Sleep.']
    """
    return [block for block, _ in _blocks(text) if block]


def _blocks(text: str) -> list[tuple[str, bool]]:
    """Return each block of a text, and whether it is a list item."""
    blocks: list[tuple[str, bool]] = []
    goes_on = False
    for line in text.split("\n"):
        item = _ITEM.match(f"{line} ")
        if not line.strip():
            goes_on = False
        elif is_heading(line):
            blocks.append((line.strip(), False))
            goes_on = False
        elif goes_on and item is None:
            before, is_item = blocks.pop()
            blocks.append((f"{before} {_plain(line)}", is_item))
        else:
            blocks.append((_plain(line[item.end() :] if item else line), item is not None))
            goes_on = True
    return blocks


def is_heading(line: str) -> bool:
    """Return whether a line is a heading."""
    return _HEADING.fullmatch(line) is not None


def sentences_of(block: str) -> list[str]:
    """Return the sentences of a paragraph, without numbers of list items. The last sentence may have no end.

    Example:
        >>> sentences_of("Dr. Lee sat. 2. Then she")
        ['Dr. Lee sat.', 'Then she']
    """
    return [sentence for sentence in _split(block) if not _NUMBER.fullmatch(sentence)]


def _split(block: str) -> list[str]:
    """Return the sentences of a paragraph, and the numbers of list items between them."""
    parts, start = [], 0
    for end in _END.finditer(block):
        part = block[start : end.end()].strip()
        if not _ABBREVIATION.search(part):
            parts.append(part)
            start = end.end()
    rest = block[start:].strip()
    if parts and rest and not re.search(r"\w", rest):  # a smiley after the last sentence
        return [*parts[:-1], f"{parts[-1]} {rest}"]
    return [*parts, rest] if rest else parts


def ends(text: str) -> bool:
    """Return whether a text ends where an answer may end: after a sentence, a heading or a short list item.

    Example:
        >>> ends("Dust it."), ends("Dust it. Then you shou"), ends("Paris")
        (True, False, True)
    """
    blocks = _blocks(text)
    if not blocks or is_heading(blocks[-1][0]):
        return bool(blocks)
    block, is_item = blocks[-1]
    parts = _split(block)
    if not parts or _NUMBER.fullmatch(parts[-1]):
        return False
    if _has_end(parts[-1]):
        return True
    # Without a mark, the text may end after a short answer, or after a short item of a list whose items have no marks.
    others_end = len(blocks) > 1 and blocks[-2][1] and _has_end(blocks[-2][0])
    is_alone = len(parts) == 1 and (len(blocks) == 1 or (is_item and not others_end))
    return is_alone and len(block.split()) <= _SHORT and block[-1] not in ",;:-(" and not _ABBREVIATION.search(block)


def _has_end(sentence: str) -> bool:
    """Return whether a sentence has a mark at its end. Signs that are no words, such as a smiley, may follow it."""
    marks = list(_END.finditer(sentence))
    if not marks or _ABBREVIATION.search(sentence[: marks[-1].end()]):
        return False
    return re.search(r"\w", sentence[marks[-1].end() :]) is None


def prose_of(text: str) -> list[str]:
    """Return the sentences of a text without headings, and without a last sentence that is cut off.

    If nothing would be left, headings and the cut sentence are returned too.
    """
    blocks = blocks_of(text)
    prose = [sentence for block in blocks if not is_heading(block) for sentence in sentences_of(block)]
    if prose and not ends(text):
        prose = prose[:-1]
    return prose or [sentence for block in blocks for sentence in sentences_of(_plain(block))]


def without_cut_sentence(text: str) -> str:
    """Return a text without the last sentence or list item if it is cut off. A text of one sentence is unchanged.

    Example:
        >>> without_cut_sentence("Dust it. Then you shou")
        'Dust it.'
    """
    if ends(text):
        return text
    for mark in reversed(list(_END.finditer(text))):
        if ends(kept := text[: mark.end()]):
            return kept
    return text


def _plain(line: str) -> str:
    return _EMPHASIS.sub("", line.strip().lstrip("#")).strip()
