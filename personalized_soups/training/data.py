"""Read preference pairs in TRL's formats from JSON lines. Errors name the file and the line.

- A standard pair is `{"prompt": "...", "chosen": "...", "rejected": "..."}`.
- A conversational pair has lists of messages in the same fields, e.g. `[{"role": "user", "content": "..."}]`. It may
  also have `tools`.
- An implicit pair has no `prompt`. Its prompt is the common start of `chosen` and `rejected`.

Other fields of a pair are ignored, except that fields with which TRL would change the text are rejected. All keys of a
message are passed to the chat template.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from blake3 import blake3

from personalized_soups.errors import InputError
from personalized_soups.files.atomic import new_file
from personalized_soups.files.regular import check_no_lfs_pointer
from personalized_soups.training.messages import Message, check_answer, read_messages, spoken
from personalized_soups.training.user_fields import with_user

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FIELDS = ("prompt", "chosen", "rejected")
_UNSUPPORTED = ("images", "image", "chat_template_kwargs")
# Field names that data sets use for a prompt. A pair with such a field is not implicit.
_PROMPT_NAMES = (
    "question", "instruction", "input", "query", "context", "system", "history", "conversation", "messages",
)  # fmt: skip
_MEND = 'write {"prompt": "...", "chosen": "...", "rejected": "..."} in every line'

Pair: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Preferences:
    """The pairs of one file.

    Args:
        path: the file.
        blake3: the digest of the file's bytes, in hex.
        pairs: `prompt`, `chosen`, `rejected` and, if present, `tools` and `user` of each pair, in the file's order.
        conversational: whether the texts are lists of messages rather than plain text.
        lines: the line number of each pair.
    """

    path: Path
    blake3: str
    pairs: tuple[Pair, ...]
    conversational: bool
    lines: tuple[int, ...]

    def place(self, index: int) -> str:
        """Return the file and line of a pair, as errors name them."""
        return f"{self.path}:{self.lines[index]}"


def read_preferences(path: Path, *, with_users: bool = False) -> Preferences:
    """Read a file of preference pairs. All pairs must be plain text, or all must be conversations.

    With `with_users`, the fields `user` and `user_text` are read too (`training.user_fields`).

    Raises:
        InputError: if the file cannot be read, is empty, or is not UTF-8 or JSON; if a field is missing or has the
            wrong type; if an answer is empty, equals the other answer, or has a message that is not the assistant's;
            or if the file mixes plain text and conversations.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the preference data can't be read: {error.strerror}", where=str(path), mend="check the path"
        ) from error
    check_no_lfs_pointer(content, path)
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(
            "the file is UTF-16, not UTF-8",
            where=f"{path}:1",
            mend="save it as UTF-8, e.g. with: iconv -f utf-16 -t utf-8",
        )
    pairs: list[Pair] = []
    lines: list[int] = []
    formats: set[bool] = set()
    for number, line in _lines(content):
        where = f"{path}:{number}"
        pair = _pair(line, where, with_users=with_users)
        formats.add(isinstance(pair["prompt"], list))
        if len(formats) > 1:
            raise InputError(
                "the file mixes plain text and conversations: this line has one, but the lines above have the other",
                where=where,
                mend="write all fields of all lines as strings, or write all of them as lists of messages",
            )
        pairs.append(pair)
        lines.append(number)
    if not pairs:
        raise InputError("the file holds no pairs", where=str(path), mend=_MEND)
    digest = blake3(content).hexdigest()
    return Preferences(path, digest, tuple(pairs), conversational=formats == {True}, lines=tuple(lines))


def check_template(preferences: Preferences, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer has a chat template if the pairs are conversations.

    Raises:
        InputError: if it has none.
    """
    if preferences.conversational and tokenizer.chat_template is None:
        raise InputError(
            "the pairs are conversations, but the base's tokenizer has no chat template",
            where=str(preferences.path),
            mend="write the pairs as plain text, or set tokenizer.chat_template and save the tokenizer with the base",
        )


def write_pairs(path: Path, pairs: Sequence[Pair]) -> None:
    """Write pairs as JSON lines. A failed write leaves `path` as it was."""
    write_lines(path, pairs)


def write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines in UTF-8. A failed write leaves `path` as it was."""
    with new_file(path) as scratch:
        scratch.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _lines(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is not blank. Only a line feed ends a line of JSON."""
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if line.strip():
            yield number, line


def _pair(line: bytes, where: str, *, with_users: bool) -> Pair:
    row = _row(line, where)
    prompt = row.get("prompt", "")
    are_lists = isinstance(row["chosen"], list) and isinstance(row["rejected"], list)
    if isinstance(prompt, list) or (are_lists and isinstance(prompt, str)):
        pair = _conversation(row, where)
        is_equal = spoken(pair["chosen"]) == spoken(pair["rejected"])
    else:
        pair = _texts(row, where)
        is_equal = pair["chosen"] == pair["rejected"]
    if with_users:
        pair = with_user(pair, row, where)
    _check_encodable(pair, where)
    if is_equal:
        raise InputError(
            "`chosen` and `rejected` are equal, so the pair states no preference", where=where, mend="remove the line"
        )
    return pair


def _row(line: bytes, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"the byte {line[error.start]:#04x} at column {error.start + 1} is not UTF-8",
            where=where,
            mend="save the file as UTF-8, e.g. with: iconv -f latin1 -t utf-8",
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"the line is not a JSON object: {error}", where=where, mend=_MEND) from error
    if not isinstance(row, dict):
        raise InputError(f"each line must be a JSON object, but found {_kind(row)}", where=where, mend=_MEND)
    for field in ("chosen", "rejected"):
        if field not in row:
            raise _missing(field, row, where)
    for field in _UNSUPPORTED:
        if row.get(field):
            raise InputError(
                f"the field {field!r} is not supported, because experts are trained on text only",
                where=where,
                mend=f"remove {field!r}, or remove the line",
            )
    return row


def _missing(field: str, row: Mapping[str, Any], where: str, because: str = "") -> InputError:
    names = ", ".join(repr(name) for name in row) or "none"
    return InputError(f"the field {field!r} is missing{because}; the line's fields: {names}", where=where, mend=_MEND)


def _conversation(row: Mapping[str, Any], where: str) -> Pair:
    """Return a conversational pair. If both answers begin with the prompt, the prompt is removed from them."""
    for field in FIELDS:
        if field in row and not isinstance(row[field], list) and isinstance(row.get("prompt"), list):
            raise InputError(
                f"`{field}` is {_kind(row[field])}, but `prompt` is a list of messages",
                where=where,
                mend="write `prompt`, `chosen` and `rejected` as strings, or write all three as lists of messages",
            )
    given = read_messages(row["prompt"], "prompt", where) if isinstance(row.get("prompt"), list) else None
    chosen = read_messages(row["chosen"], "chosen", where)
    rejected = read_messages(row["rejected"], "rejected", where)
    prompt = _shared_messages(row, chosen, rejected, where) if given is None else given
    num_shared = len(prompt)
    if given is not None and (given[0]["role"] == "assistant" or not _both_begin_with(given, chosen, rejected)):
        num_shared = 0  # the answers do not repeat the prompt
    pair: Pair = {"prompt": prompt, "chosen": chosen[num_shared:], "rejected": rejected[num_shared:]}
    for field in ("chosen", "rejected"):
        check_answer(pair[field], field, where)
    tools = _tools(row, where)
    return {**pair, "tools": tools} if tools else pair


def _shared_messages(
    row: Mapping[str, Any], chosen: list[Message], rejected: list[Message], where: str
) -> list[Message]:
    """Return the common first messages of both conversations as the prompt, like TRL's extract_prompt.

    At least one message of each conversation remains as the answer. Some data sets repeat the prompt's last message as
    plain text under `prompt`.
    """
    prompt = chosen[: _num_shared(chosen, rejected)]
    if "prompt" not in row:
        if not prompt:
            raise _missing("prompt", row, where, ", and `chosen` and `rejected` have no common first message")
        return prompt
    if not prompt or prompt[-1]["role"] != "user" or prompt[-1]["content"].strip() != row["prompt"].strip():
        raise InputError(
            "`chosen` is a list of messages, but `prompt` is text and differs from the last message before the answers",
            where=where,
            mend="write `prompt`, `chosen` and `rejected` as strings, or write all three as lists of messages",
        )
    return prompt


def _both_begin_with(prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> bool:
    return all(answer[: len(prompt)] == prompt and len(answer) > len(prompt) for answer in (chosen, rejected))


def _num_shared(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    shortest = min(len(chosen), len(rejected))
    return next((place for place in range(shortest) if chosen[place] != rejected[place]), shortest - 1)


def _texts(row: dict[str, Any], where: str) -> Pair:
    """Return a pair of plain texts. A missing prompt is the common start of both, as in TRL's extract_prompt."""
    if row.get("tools"):
        raise InputError(
            "the field 'tools' is not supported with plain text, because only a chat template can render tools",
            where=where,
            mend="write `prompt`, `chosen` and `rejected` as lists of messages, or remove 'tools'",
        )
    if "prompt" not in row:
        row = {**row, **_implicit_texts(row, where)}
    for field in FIELDS:
        _check_text(row[field], field, where)
    return {field: row[field] for field in FIELDS}


def _implicit_texts(row: Mapping[str, Any], where: str) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    named = [name for name in row if name in _PROMPT_NAMES and row[name]]
    if named:
        raise _missing("prompt", row, where, f" ({named[0]!r} may be the prompt)")
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise _missing("prompt", row, where)
    num_shared = _num_shared(chosen, rejected) if chosen and rejected else 0
    if num_shared and chosen[num_shared - 1] == " ":
        num_shared -= 1  # the space belongs to the next word
    if not chosen[:num_shared].strip():
        raise _missing("prompt", row, where, ", and `chosen` and `rejected` have no common start")
    return {"prompt": chosen[:num_shared], "chosen": chosen[num_shared:], "rejected": rejected[num_shared:]}


def _tools(row: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """Return the tools of a conversation. The field may be a list of JSON schemas or, as in TRL, its JSON text."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except (ValueError, RecursionError):
        tools = None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and tool for tool in tools):
        raise InputError(
            "`tools` is not a list of JSON schemas",
            where=where,
            mend='write e.g. [{"type": "function", "function": {"name": "look"}}], or remove `tools`',
        )
    return tools


def _check_encodable(pair: Pair, where: str) -> None:
    """Raise InputError if the pair has a lone surrogate such as `\\ud800`, which UTF-8 cannot encode."""
    try:
        json.dumps(pair, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text has {error.object[error.start]!r}, which is half of a surrogate pair and not a character",
            where=where,
            mend="write the whole character, or remove this half",
        ) from error


def _check_text(value: object, field: str, where: str) -> None:
    if not isinstance(value, str):
        raise InputError(
            f"`{field}` is {_kind(value)}, "
            + ("but must be text or a list of messages" if field == "prompt" else "but `prompt` is text"),
            where=where,
            mend="write `prompt`, `chosen` and `rejected` as strings, or write all three as lists of messages",
        )
    if not value.strip():
        raise InputError(f"`{field}` is empty", where=where, mend=f"write the text of `{field}`, or remove the line")


def _kind(value: object) -> str:
    names = {str: "text", list: "a list", dict: "an object", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
