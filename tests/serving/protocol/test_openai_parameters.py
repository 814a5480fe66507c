"""Every parameter in the types of the installed openai package is supported, ignored or unsupported.

These tests fail for a newer package that adds a parameter, until the parameter is in one of the three groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from openai.types.chat import ChatCompletionContentPartParam, ChatCompletionMessage, ChatCompletionMessageParam
from openai.types.chat import ChatCompletionStreamOptionsParam as StreamOptionsParam
from openai.types.chat.completion_create_params import CompletionCreateParams as ChatParams
from openai.types.completion_create_params import CompletionCreateParams as CompletionParams
from pydantic import ValidationError

from personalized_soups.generation.prompts import encode_prompt
from personalized_soups.serving.protocol.requests import (
    IGNORED,
    UNSUPPORTED,
    UNSUPPORTED_KEYS,
    AnswerRequest,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    StreamOptions,
    TextPart,
)

_REQUIRED: dict[type[AnswerRequest], dict[str, Any]] = {
    ChatRequest: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    CompletionRequest: {"model": "m", "prompt": "x"},
}
# A value that no parameter's type has, and so no harmless value.
_SAMPLE = {"x": [1]}


def _hints(union: Any) -> dict[str, list[Any]]:
    """Return the types of every key of the typed dictionaries in a union."""
    hints: dict[str, list[Any]] = {}
    for table in _members(union):
        for name, hint in get_type_hints(table).items():
            hints.setdefault(name, []).append(hint)
    return hints


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in {Union, UnionType} else (hint,)


def _words(hint: Any) -> Iterator[Any]:
    """Yield the literal values in a type."""
    if get_origin(hint) is Literal:
        yield from get_args(hint)
    elif get_origin(hint) in {Union, UnionType}:
        for member in get_args(hint):
            yield from _words(member)


_PARAMETERS: dict[type[AnswerRequest], dict[str, list[Any]]] = {
    ChatRequest: _hints(ChatParams),
    CompletionRequest: _hints(CompletionParams),
}
_ALL = [(kind, name) for kind, names in _PARAMETERS.items() for name in names]
_MESSAGES = {get_args(get_type_hints(each)["role"])[0]: each for each in get_args(ChatCompletionMessageParam)}
_PARTS = {
    get_args(get_type_hints(each)["type"])[0]: each
    for each in (
        *_members(ChatCompletionContentPartParam),
        *(
            part
            for member in _members(get_type_hints(_MESSAGES["assistant"])["content"])
            for item in get_args(member)
            for part in _members(item)
        ),
    )
}


def _parsed(kind: type[AnswerRequest], **options: Any) -> AnswerRequest:
    return kind.model_validate({**_REQUIRED[kind], **options})


def _message(**keys: Any) -> ChatMessage:
    return ChatMessage.model_validate({"role": "user", "content": "x", **keys})


def test_the_types_are_read() -> None:
    assert {"messages", "tools", "seed", "stream"} <= set(_PARAMETERS[ChatRequest])
    assert {"prompt", "echo", "best_of", "stream"} <= set(_PARAMETERS[CompletionRequest])
    assert {"user", "assistant", "tool", "system"} <= set(_MESSAGES)
    assert {"text", "image_url", "input_audio", "refusal"} <= set(_PARTS)


@pytest.mark.parametrize(("kind", "name"), _ALL)
def test_every_parameter_is_in_one_group(kind: type[AnswerRequest], name: str) -> None:
    places = [name in kind.model_fields, name in IGNORED, name in UNSUPPORTED]
    assert places.count(True) == 1, f"{name} is new: support it, or add it to IGNORED or UNSUPPORTED"


@pytest.mark.parametrize(("kind", "name"), [pair for pair in _ALL if pair[1] not in {"model", "messages", "prompt"}])
def test_null_means_that_a_parameter_is_absent(kind: type[AnswerRequest], name: str) -> None:
    assert _parsed(kind, **{name: None}) == _parsed(kind)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("name", sorted(IGNORED))
def test_an_ignored_parameter_may_have_any_value(kind: type[AnswerRequest], name: str) -> None:
    words = [word for hint in _PARAMETERS[ChatRequest].get(name, []) for word in _words(hint)]
    for value in (_SAMPLE, "x", True, *words):
        assert _parsed(kind, **{name: value}) == _parsed(kind)


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_an_unsupported_parameter_is_rejected_by_name(kind: type[AnswerRequest], name: str) -> None:
    words = [word for names in _PARAMETERS.values() for hint in names.get(name, []) for word in _words(hint)]
    rejected = [_SAMPLE, *(word for word in words if word not in UNSUPPORTED[name])]
    for value in rejected:
        with pytest.raises(ValidationError, match=f"{name} is not supported"):
            _parsed(kind, **{name: value})
    for value in UNSUPPORTED[name]:
        assert _parsed(kind, **{name: value}) == _parsed(kind)


def test_stream_options_are_all_known() -> None:
    assert set(get_type_hints(StreamOptionsParam)) <= set(StreamOptions.model_fields)


# ---- messages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "name"), [(role, name) for role, table in _MESSAGES.items() for name in _hints(table)]
)
def test_every_key_of_a_message_is_in_one_group(role: str, name: str) -> None:
    assert (name in ChatMessage.model_fields) + (name in UNSUPPORTED_KEYS) == 1, f"{name} of {role} is new"


@pytest.mark.parametrize("role", sorted(_MESSAGES))
def test_every_role_is_accepted_or_rejected_by_name(role: str) -> None:
    if role in {"developer", "system", "user", "assistant"}:
        assert _message(role=role).plain()["role"] == ("system" if role == "developer" else role)
        return
    with pytest.raises(ValidationError, match="role"):
        _message(role=role)


@pytest.mark.parametrize("name", sorted(UNSUPPORTED_KEYS))
def test_content_other_than_text_is_rejected_by_name(name: str) -> None:
    for value in (_SAMPLE, [_SAMPLE], "x", True):
        with pytest.raises(ValidationError, match=f"{name} is not supported"):
            _message(**{name: value})
    empty: tuple[Any, ...] = (None, [], {}, "", False)
    for value in empty:
        assert _message(**{name: value}) == _message()


@pytest.mark.parametrize(
    "notes",
    [{"id": 1}, {"id": "msg_1", "createdAt": "2026-01-01T00:00:00Z"}, {"timestamp": 1.5}, {"metadata": {"a": 1}},
     {"cache_control": {"type": "ephemeral"}}, {"annotations": [{"type": "url_citation"}]}, {"weight": 0}, {"": None}],
)  # fmt: skip
def test_a_clients_own_notes_on_a_message_are_ignored(notes: dict[str, Any]) -> None:
    assert _message(**notes) == _message()
    part = TextPart.model_validate({"type": "text", "text": "x", **notes})
    assert part == TextPart(type="text", text="x")


def test_an_answer_can_be_sent_back_unchanged() -> None:
    answer = ChatCompletionMessage(role="assistant", content="rub it")
    for sent in (answer.model_dump(), answer.model_dump(exclude_unset=True)):
        assert ChatMessage.model_validate(sent).plain() == {"role": "assistant", "content": "rub it"}


@pytest.mark.parametrize("kind", sorted(_PARTS))
def test_content_parts_other_than_text_are_rejected_by_name(kind: str) -> None:
    if kind == "text":
        keys = {name: _SAMPLE for name in _hints(_PARTS[kind])} | {"type": "text", "text": "ab"}
        assert _message(content=[keys, keys]).plain()["content"] == "abab"
        return
    with pytest.raises(ValidationError, match=f"content of type '{kind}' is not supported"):
        _message(content=[{"type": "text", "text": "x"}, {"type": kind, kind: {"url": "data:,"}}])


class _NamingTokenizer:
    """A tokenizer whose template names the speaker, as some templates do."""

    chat_template = "{{ message.name }}"
    name_or_path = "naming"

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        return "".join(f"{message.get('name', message['role'])}: {message['content']}\n" for message in messages)

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}


def test_a_speakers_name_reaches_the_template() -> None:
    messages = [{"role": "user", "content": "x", "name": "ada"}, {"role": "user", "content": "y", "name": None}]
    body = ChatRequest.model_validate({"model": "m", "messages": messages})
    tokenizer: Any = _NamingTokenizer()
    assert bytes(encode_prompt(tokenizer, body.conversation())) == b"ada: x\nuser: y\n"
