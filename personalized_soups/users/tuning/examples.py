"""Read a user's examples: a JSON Lines file with a prompt and a text in each line."""

from __future__ import annotations

import json
from pathlib import Path

from personalized_soups.declare.evidence import Example
from personalized_soups.declare.loader import load_data, read_text
from personalized_soups.errors import DeclarationError

_FORMAT = 'write one example per line: {"prompt": "...", "text": "..."}'


def read_examples(path: Path | str) -> list[Example]:
    """Return the examples of a JSON Lines file. Empty lines are skipped.

    Raises:
        DeclarationError: if the file cannot be read or holds no examples, or if a line is not an example.
    """
    path = Path(path)
    lines = read_text(path).split("\n")
    examples = [_example(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not examples:
        raise DeclarationError("the file holds no examples", where=str(path), mend=_FORMAT)
    return examples


def _example(line: str, where: str) -> Example:
    try:
        table = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DeclarationError(f"the line is not JSON: {str(error)[:200]}", where=where, mend=_FORMAT) from None
    if not isinstance(table, dict):
        raise DeclarationError(
            f"the line holds a {type(table).__name__}, which is not an example", where=where, mend=_FORMAT
        )
    return load_data(table, Example, where)
