"""Render messages with a base's chat template, and find the keys of messages that the template does not render."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import template_faults
from personalized_soups.training.data import Pair
from personalized_soups.training.messages import SPOKEN_KEYS, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Three names of the same key: transformers copies a message's reasoning to all of them before it calls the template.
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_COMMENT = re.compile(r"{#.*?#}", re.DOTALL)


class ChatRenderer:
    """Renders messages of one pair with the base's chat template.

    Args:
        pair: the pair. Its `tools` are passed to the template in every call.
        tokenizer: the tokenizer with the chat template.
        place: the file and line of the pair, for errors.
    """

    def __init__(self, pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
        self.tools = pair.get("tools")
        self._tokenizer = tokenizer
        self._place = place

    def ids(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Return the token ids of the rendered messages."""
        return list(self._apply(messages, tokenize=True, return_dict=True, **options)["input_ids"])

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """Return the text of the rendered messages."""
        return str(self._apply(messages, tokenize=False, **options))

    def renders(self, key: str, messages: Sequence[Message]) -> bool:
        """Return whether the template renders `key` of any of the messages.

        Raises:
            InputError: if the template does not render a key that holds a part of what the speaker said.
        """
        if not any(key in message for message in messages):
            return False
        if self._names(key):
            return True
        without = [{name: value for name, value in message.items() if name != key} for message in messages]
        if self.text(without) != self.text(messages):
            return True
        if key in SPOKEN_KEYS:
            raise self._lost(f"a message has {key!r}, but the base's chat template does not render it", key)
        return False

    def is_reshaped(self, prompt: Sequence[Message], wholes: Sequence[Sequence[Message]]) -> bool:
        """Return whether the template renders the prompt differently when an answer follows.

        That is the case if the texts of `prompt` and of a conversation in `wholes` diverge before the end of the
        prompt's last message.
        """
        last = prompt[-1]["content"].strip()
        before = self.text(prompt, add_generation_prompt=True)
        start = before.rfind(last)
        return start >= 0 and any(num_common(before, self.text(whole)) < start + len(last) for whole in wholes)

    def check_tools(self, messages: Sequence[Message]) -> None:
        """Raise InputError if the pair has tools and the template does not render them."""
        if not self.tools or self._names("tools"):
            return
        without_tools = ChatRenderer({}, self._tokenizer, self._place)
        if without_tools.text(messages) == self.text(messages):
            raise self._lost("the pair has 'tools', but the base's chat template does not render them", "tools")

    def _names(self, key: str) -> bool:
        """Return whether the template's source mentions `key` or, for a key of reasoning, another name of the key."""
        with template_faults(self._place):
            template = _COMMENT.sub("", str(self._tokenizer.get_chat_template(tools=self.tools)))
        if key == "tools":
            return re.search(r"\btools\b", template) is not None
        names = "|".join(map(re.escape, _REASONING_KEYS if key in _REASONING_KEYS else [key]))
        return re.search(rf"\.(?:{names})\b|(['\"])(?:{names})\1", template) is not None

    def _lost(self, what: str, key: str) -> InputError:
        return InputError(
            f"{what}, so training would lose this content",
            where=self._place,
            mend=f"use a base whose chat template renders {key!r}, or remove {key!r} from the data",
        )

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        """Return the rendered messages.

        OpenAI writes the arguments of a tool call as JSON text. Most templates expect an object and would quote the
        text, so the arguments are parsed first. If the template rejects the object, it gets the text.
        """
        parsed = [_with_objects(message) for message in messages]
        options |= {"tools": self.tools}
        if parsed != list(messages):
            with suppress(InputError):
                return self._rendered(parsed, **options)
        return self._rendered(messages, **options)

    def _rendered(self, messages: Sequence[Message], **options: Any) -> Any:
        with template_faults(self._place):
            return self._tokenizer.apply_chat_template(list(messages), **options)


def _with_objects(message: Message) -> Message:
    """Return the message with every tool call's arguments parsed if they are the JSON text of an object."""
    if not isinstance(message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [_call_with_object(call) for call in message["tool_calls"]]}


def _call_with_object(call: dict[str, Any]) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_object(call["function"])}
    return _with_object(call)


def _with_object(function: dict[str, Any]) -> dict[str, Any]:
    try:
        arguments = json.loads(function["arguments"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def num_common(ids: Sequence[object], other: Sequence[object]) -> int:
    """Return the length of the longest common start of two sequences."""
    shortest = min(len(ids), len(other))
    return next((place for place in range(shortest) if ids[place] != other[place]), shortest)
