"""Messages of preference data, as a chat template takes them; what can't be trained is refused by name."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from personalized_soups.errors import InputError

Message: TypeAlias = dict[str, Any]

# Keys that hold a part of what was said. Where a chat template has no place for one, training would lose it.
SPOKEN_KEYS = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
)
_MEDIA_KEYS = ("audio", "image", "images", "video", "videos")
# OpenAI's `weight` and its likes: 0 or false asks for a message without loss.
_LOSS_KEYS = ("weight", "loss_weight", "train", "trainable")
_MESSAGE_MEND = 'write each message as {"role": "user", "content": "..."}'


def read_messages(value: list[Any], field: str, where: str) -> list[Message]:
    """Return the messages of a field: role, text, and every further key that is not empty.

    Parts of content are joined. Which of the further keys the model reads, the chat template decides.

    Raises:
        InputError: naming `where` and the message: no role, no text, a part that is not text, a call without a name.
    """
    if not value:
        raise InputError(f"`{field}` is empty", where=where, mend="give it at least one message")
    return [_message(message, field, number, where) for number, message in enumerate(value)]


def check_answer(messages: Sequence[Message], field: str, where: str) -> None:
    """Raise InputError unless every message of an answer is the assistant's and is to be trained.

    All tokens of an answer enter the loss: another speaker's words in it would be learned as the model's own.
    """
    first = messages[0]["role"]
    if first != "assistant":
        raise InputError(
            f"`{field}` begins with a message of the role {first!r}: an answer is the assistant's",
            where=where,
            mend='write {"role": "assistant", "content": "..."}, and what was said before it under `prompt`',
        )
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            raise InputError(
                f"`{field}` has a message of the role {message['role']!r} (message {number + 1}); every message of an "
                "answer is trained as the assistant's own words",
                where=where,
                mend=f"end `{field}` before that message, or move everything up to it into `prompt`",
            )
        for key in _LOSS_KEYS:
            if key in message and not message[key]:
                raise InputError(
                    f"`{field}` has a message with {key!r}: {json.dumps(message[key])} (message {number + 1}); every "
                    "message of an answer is trained",
                    where=where,
                    mend=f"move that message into `prompt`, or take {key!r} out",
                )


def spoken(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the keys alone that hold what was said and by whom."""
    return [{key: value for key, value in message.items() if key in _SAID} for message in messages]


def further_keys(messages: Sequence[Message]) -> set[str]:
    """Return the keys of the messages besides role and content."""
    return {key for message in messages for key in message} - {"role", "content"}


_SAID = frozenset({"role", "content", *SPOKEN_KEYS})


def _message(message: object, field: str, number: int, where: str) -> Message:
    if not isinstance(message, dict) or not _is_text(message.get("role")):
        raise _no_text(message, field, where)
    # Tables exported from a dataset write null into every key that only some messages have.
    further = {
        key: value
        for key, value in message.items()
        if key not in {"role", "content"} and value is not None and value not in ("", [], {})
    }
    for key in _MEDIA_KEYS:
        if key in further:
            raise InputError(
                f"`{field}` has a message with {key!r}: experts are trained on text alone",
                where=where,
                mend=f"take {key!r} out, or the line",
            )
    _check_calls(further.get("tool_calls", []), field, number, where)
    content = _content(message.get("content"), field, where)
    may_be_silent = message["role"] == "tool" or "tool_calls" in further or "function_call" in further
    if content is None or not (content.strip() or may_be_silent):
        raise _no_text(message, field, where)
    return {"role": message["role"], "content": content, **further}


def _content(content: object, field: str, where: str) -> str | None:
    """Return a message's text, None where it is of another kind; parts are joined as the server joins them."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content if isinstance(content, str) else None
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(part, dict) or kind != "text" or not isinstance(part.get("text"), str):
            raise InputError(
                f"`{field}` has a content part that is not text: {json.dumps(part)[:80]}",
                where=where,
                mend='experts are trained on text alone: write parts as {"type": "text", "text": "..."}, or take the '
                "line out",
            )
        texts.append(part["text"])
    return "".join(texts)


def _check_calls(calls: object, field: str, number: int, where: str) -> None:
    """Raise InputError unless `calls` are tool calls with names, nested as OpenAI writes them or flat."""
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not _is_text(function.get("name")):
            raise InputError(
                f"`{field}` has a tool call without a function's name (message {number + 1}): {json.dumps(call)[:80]}",
                where=where,
                mend='write {"type": "function", "function": {"name": "...", "arguments": {...}}}',
            )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _no_text(message: object, field: str, where: str) -> InputError:
    return InputError(
        f"`{field}` has a message without a role or without text: {json.dumps(message)[:80]}",
        where=where,
        mend=_MESSAGE_MEND,
    )
