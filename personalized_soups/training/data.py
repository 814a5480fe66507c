"""Preference pairs in TRL's format, read from JSON lines; every fault names its file and line.

Standard: `{"prompt": "...", "chosen": "...", "rejected": "..."}`. Conversational: the same fields as lists of messages,
`[{"role": "user", "content": "..."}]`. Other fields, of a pair or of a message, are left aside, except those by which
TRL would change the text.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from blake3 import blake3

from personalized_soups.errors import InputError
from personalized_soups.files.atomic import new_file

FIELDS = ("prompt", "chosen", "rejected")
_NOT_TAKEN = ("images", "image", "tools", "chat_template_kwargs")
_MEND = 'write {"prompt": ..., "chosen": ..., "rejected": ...} in every line'

Pair: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preferences:
    """The pairs of one file.

    Args:
        path: the file they were read from.
        blake3: the digest of its bytes, in hex.
        pairs: prompt, chosen and rejected of each pair, in the order of the file.
        conversational: whether they are lists of messages rather than plain text.
    """

    path: Path
    blake3: str
    pairs: tuple[Pair, ...]
    conversational: bool


def read_preferences(path: Path) -> Preferences:
    """Read a file of preference pairs, all of one format.

    Raises:
        InputError: naming file and line: not readable, empty, not UTF-8, not JSON, a field missing or of the wrong
            kind, an empty answer, equal answers, plain text and conversations mixed.
    """
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise InputError(
            f"the preference data can't be read: {fault.strerror}", where=str(path), mend="check the path"
        ) from fault
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(
            "the file is UTF-16, not UTF-8", where=f"{path}:1", mend="save it as UTF-8: iconv -f utf-16 -t utf-8"
        )
    pairs: list[Pair] = []
    formats: set[bool] = set()
    for number, line in _lines(content):
        where = f"{path}:{number}"
        pair = _pair(line, where)
        formats.add(isinstance(pair["prompt"], list))
        if len(formats) > 1:
            raise InputError(
                "plain text and conversations are mixed in one file; the lines above hold the other format",
                where=where,
                mend="write all fields of all lines as strings, or all as lists of messages",
            )
        pairs.append(pair)
    if not pairs:
        raise InputError("the file holds no pair", where=str(path), mend=_MEND)
    return Preferences(path, blake3(content).hexdigest(), tuple(pairs), conversational=formats == {True})


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON lines, all or nothing."""
    write_lines(path, pairs)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write JSON lines, UTF-8, all or nothing."""
    with new_file(path) as scratch:
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield number and bytes of each line that is not blank; split at line feeds only, as JSON lines are."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _pair(line: bytes, where: str) -> Pair:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as fault:
        raise InputError(
            f"byte {line[fault.start]:#04x} at column {fault.start + 1} is not UTF-8",
            where=where,
            mend="save the file as UTF-8, e.g. with: iconv -f latin1 -t utf-8",
        ) from fault
    except (ValueError, RecursionError) as fault:
        raise InputError(f"not a JSON object: {fault}", where=where, mend=_MEND) from fault
    if not isinstance(row, dict):
        raise InputError(f"expected a JSON object, found {_kind(row)}", where=where, mend=_MEND)
    _check_fields(row, where)
    check = _check_conversation if isinstance(row["prompt"], list) else _check_text
    for field in FIELDS:
        check(row[field], field, where)
    pair = {field: _bare(row[field]) for field in FIELDS}
    _check_encodable(pair, where)
    if pair["chosen"] == pair["rejected"]:
        raise InputError(
            "`chosen` and `rejected` are equal: the pair says nothing", where=where, mend="take the line out"
        )
    return pair


def _check_fields(row: dict[str, Any], where: str) -> None:
    missing = [field for field in FIELDS if field not in row]
    if missing:
        found = ", ".join(repr(field) for field in row) or "none"
        raise InputError(f"the field {missing[0]!r} is missing; found: {found}", where=where, mend=_MEND)
    for field in _NOT_TAKEN:
        if row.get(field):
            raise InputError(
                f"the field {field!r} is not taken: experts are trained on text alone",
                where=where,
                mend=f"take {field!r} out, or the line",
            )


def _bare(value: str | list[dict[str, str]]) -> str | list[dict[str, str]]:
    """Return a field without what is left aside: of each message its role and its text."""
    if isinstance(value, str):
        return value
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _check_encodable(pair: Pair, where: str) -> None:
    """Raise InputError where a `\\ud800` in the JSON stands alone: it is no character, and no file can hold it."""
    try:
        json.dumps(pair, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as fault:
        raise InputError(
            f"{fault.object[fault.start]!r} is half of a surrogate pair, not a character",
            where=where,
            mend="write the character itself, or take it out",
        ) from fault


def _check_text(value: object, field: str, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(
            f"`{field}` is {_kind(value)}, "
            + ("expected text or a list of messages" if field == "prompt" else "`prompt` is text"),
            where=where,
            mend="write all three as strings, or all three as lists of messages",
        )
    if not value.strip():
        raise InputError(f"`{field}` is empty", where=where, mend="fill it in, or take the line out")


def _check_conversation(value: object, field: str, where: str) -> None:
    if not isinstance(value, list):
        raise InputError(
            f"`{field}` is {_kind(value)}, `prompt` is a list of messages",
            where=where,
            mend="write all three as strings, or all three as lists of messages",
        )
    if not value:
        raise InputError(f"`{field}` is empty", where=where, mend="give it at least one message")
    is_text: Callable[[object], bool] = lambda part: isinstance(part, str) and bool(part.strip())  # noqa: E731
    for message in value:
        if not isinstance(message, dict) or not is_text(message.get("role")) or not is_text(message.get("content")):
            raise InputError(
                f"`{field}` has a message without a role or without text: {json.dumps(message)[:80]}",
                where=where,
                mend='write each message as {"role": "user", "content": "..."}',
            )
    if field != "prompt" and value[0]["role"] != "assistant":
        raise InputError(
            f"`{field}` begins with a message of the role {value[0]['role']!r}: an answer is the assistant's",
            where=where,
            mend='write {"role": "assistant", "content": "..."}, and what was said before it under `prompt`',
        )


def _kind(value: object) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
