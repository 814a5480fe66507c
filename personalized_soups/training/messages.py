"""Read and check the messages of preference data. Messages that cannot be trained are rejected."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from personalized_soups.errors import InputError

Message: TypeAlias = dict[str, Any]

# Keys that hold a part of what the speaker said. Training would lose the content of a key that the template does not
# render.
SPOKEN_KEYS = (
    "tool_calls",
    "function_call",
    "reasoning_content",
    "reasoning",
    "thinking",
    "refusal",
)
_MEDIA_KEYS = ("audio", "image", "images", "video", "videos")
# OpenAI's `weight` and similar keys: 0 or false excludes a message from the loss.
_LOSS_KEYS = ("weight", "loss_weight", "train", "trainable")
_MESSAGE_MEND = 'write each message as {"role": "user", "content": "..."}'


def read_messages(value: list[Any], field: str, where: str) -> list[Message]:
    """Return the messages of a field. Each message has its role, its text, and every further key that is not empty.

    If the content is a list of parts, the parts are joined. The chat template decides which further keys it renders.

    Raises:
        InputError: if a message has no role, no text, a part that is not text, or a tool call without a name.
    """
    if not value:
        raise InputError(
            f"`{field}` is empty",
            where=where,
            mend='write at least one message, e.g. {"role": "user", "content": "Hello"}',
        )
    return [_message(message, field, number, where) for number, message in enumerate(value)]


def check_answer(messages: Sequence[Message], field: str, where: str) -> None:
    """Raise InputError unless every message of an answer is the assistant's and is meant to enter the loss.

    All tokens of an answer enter the loss, so the model would learn another speaker's words as its own.
    """
    first = messages[0]["role"]
    if first != "assistant":
        raise InputError(
            f"`{field}` begins with a message of the role {first!r}, but must begin with the role 'assistant'",
            where=where,
            mend='write {"role": "assistant", "content": "..."}, and put earlier messages under `prompt`',
        )
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            raise InputError(
                f"`{field}` has a message of the role {message['role']!r} (message {number + 1}), but the model learns "
                "every message of an answer as its own words",
                where=where,
                mend=f"end `{field}` before this message, or move this message and all earlier ones into `prompt`",
            )
        for key in _LOSS_KEYS:
            if key in message and not message[key]:
                raise InputError(
                    f"`{field}` has a message with {key!r}: {json.dumps(message[key])} (message {number + 1}), but "
                    "every message of an answer enters the loss",
                    where=where,
                    mend=f"move this message into `prompt`, or remove {key!r}",
                )


def spoken(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with only the role and the keys that hold the speaker's words."""
    return [{key: value for key, value in message.items() if key in _COMPARED} for message in messages]


def further_keys(messages: Sequence[Message]) -> set[str]:
    """Return the keys of the messages other than role and content."""
    return {key for message in messages for key in message} - {"role", "content"}


_COMPARED = frozenset({"role", "content", *SPOKEN_KEYS})


def _message(message: object, field: str, number: int, where: str) -> Message:
    if not isinstance(message, dict) or not _is_text(message.get("role")):
        raise _no_text(message, field, where)
    # An exported data set has null under every key that only some messages have.
    further = {
        key: value
        for key, value in message.items()
        if key not in {"role", "content"} and value is not None and value not in ("", [], {})
    }
    for key in _MEDIA_KEYS:
        if key in further:
            raise InputError(
                f"`{field}` has a message with {key!r}, but experts are trained on text only",
                where=where,
                mend=f"remove {key!r}, or remove the line",
            )
    _check_calls(further.get("tool_calls", []), field, number, where)
    content = _content(message.get("content"), field, where)
    may_be_silent = message["role"] == "tool" or "tool_calls" in further or "function_call" in further
    if content is None or not (content.strip() or may_be_silent):
        raise _no_text(message, field, where)
    return {"role": message["role"], "content": content, **further}


def _content(content: object, field: str, where: str) -> str | None:
    """Return a message's text, or None if the content is not text. Parts are joined as in the server."""
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
                mend='write each part as {"type": "text", "text": "..."}, or remove the line: experts are trained on '
                "text only",
            )
        texts.append(part["text"])
    return "".join(texts)


def _check_calls(calls: object, field: str, number: int, where: str) -> None:
    """Raise InputError if a call has no name, neither in `function.name` (OpenAI's format) nor in `name`."""
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
