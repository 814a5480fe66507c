"""Read JSON Lines files line by line. Errors name the file and the line. Only one line at a time is in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.loader import load_data
from personalized_soups.errors import DeclarationError

T = TypeVar("T", bound=Declared)


@dataclass(frozen=True, slots=True)
class LineKind:
    """What the lines of a file hold, for errors.

    Attributes:
        what: the thing that a line holds, such as `profile`.
        example: a line of it.
    """

    what: str
    example: str


def declared_lines(path: Path, model: type[T], kind: LineKind) -> Iterator[T]:
    """Yield the object of each line that is not blank.

    Raises:
        DeclarationError: if the file cannot be read or is not UTF-8, or a line is not JSON or not valid.
    """
    for where, line in text_lines(path):
        yield load_data(json_object(line, where, kind), model, where)


def text_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield the place, as `file:line`, and the text of each line that is not blank.

    Bytes that are not UTF-8 become surrogates, so that `json_object` finds them in their line.

    Raises:
        DeclarationError: if the file cannot be read.
    """
    try:
        # A strict decoder fails on a whole block of lines, although only one line has the invalid byte. surrogateescape
        # keeps the invalid byte, so it is found in its line.
        with path.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except OSError as error:
        raise DeclarationError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check the path and the permissions"
        ) from error


def json_object(line: str, where: str, kind: LineKind) -> dict[str, Any]:
    """Return the JSON object in a line.

    Raises:
        DeclarationError: if the line is not UTF-8, not JSON or not an object, or if a key is repeated.
    """
    if not line.isascii():
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) & 0xFF  # surrogateescape decodes an invalid byte as U+DC00 plus the byte
            raise DeclarationError(
                f"the line is not UTF-8: byte 0x{byte:02x} is invalid", where=where, mend="save the file as UTF-8"
            ) from None
    try:
        table = json.loads(line, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        raise DeclarationError(
            f"the line is not JSON: {str(error)[:200]}",
            where=where,
            mend=f"write one {kind.what} per line, as JSON: {kind.example}",
        ) from None
    if not isinstance(table, dict):
        raise DeclarationError(
            f"the line holds a {type(table).__name__}, which is not a {kind.what}",
            where=where,
            mend=f"write one {kind.what} per line: {kind.example}",
        )
    return table


class SeenTexts:
    """The texts of the lines that were read, such as prompts. Each is stored as a digest of 16 bytes."""

    def __init__(self) -> None:
        self._places: dict[bytes, str] = {}

    def add(self, text: str, where: str) -> str | None:
        """Add a text, and return the place of an earlier line with the same text, or None."""
        mark = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        earlier = self._places.setdefault(mark, where)
        return None if earlier == where else earlier


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is repeated")
    return table
