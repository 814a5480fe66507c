"""Preference pairs as token ids: what is trained, what is left out, and what the reader should know of both.

The ids are those of TRL's DPOTrainer. They are made here so that a template's fault names file and line, and so that
nested values (tool calls) reach the template as the file holds them: a table of datasets would fill every message with
the keys of all others.
"""

from __future__ import annotations

import json
import re
from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import check_tokens, template_faults
from personalized_soups.training.data import Pair, Preferences
from personalized_soups.training.messages import SPOKEN_KEYS, Message, further_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # transformers gives a template all of them for one
_COMMENT = re.compile(r"{#.*?#}", re.DOTALL)


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair as token ids (4 bytes each); the answer begins where prompt and whole texts diverge.

    Args:
        prompt_ids: what both texts begin with, at most the prompt.
        chosen_ids: the rest of the chosen text.
        rejected_ids: the rest of the rejected text.
        place: file and line.
    """

    prompt_ids: array[int]
    chosen_ids: array[int]
    rejected_ids: array[int]
    place: str

    def cut(self, max_length: int) -> tuple[array[int], array[int]]:
        """Return both texts as the trainer cuts them."""
        return (self.prompt_ids + self.chosen_ids)[:max_length], (self.prompt_ids + self.rejected_ids)[:max_length]

    def num_cut(self, max_length: int) -> int:
        """Return how many of the two texts lose their end."""
        answers = (self.chosen_ids, self.rejected_ids)
        return sum(len(self.prompt_ids) + len(answer) > max_length for answer in answers)


@dataclass(slots=True)
class EncodedPairs:
    """The pairs of one file as token ids.

    Args:
        max_length: tokens of prompt and answer together; longer texts are cut.
        is_chat: whether a chat template made them.
        pairs: the pairs that are trained, shorter ones first.
        filled: places of the pairs whose prompt alone fills `max_length`.
        equal: places of the pairs whose two texts are the same tokens before they are cut.
        equal_once_cut: places of the pairs whose two texts are the same tokens once they are cut.
        reshaped: places of the pairs whose prompt the template renders differently when an answer follows.
        carried: keys of messages, beside role and content, that the template was given.
        unrendered: keys among them that the template has no place for, with the number of pairs.
    """

    max_length: int
    is_chat: bool
    pairs: list[EncodedPair] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    equal: list[str] = field(default_factory=list)
    equal_once_cut: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    carried: set[str] = field(default_factory=set)
    unrendered: Counter[str] = field(default_factory=Counter)

    def add(self, pair: EncodedPair) -> None:
        """Keep a pair, or count why it is left out."""
        chosen, rejected = pair.cut(self.max_length)
        if len(pair.prompt_ids) >= self.max_length:
            self.filled.append(pair.place)
        elif pair.chosen_ids == pair.rejected_ids:
            self.equal.append(pair.place)
        elif chosen == rejected:
            self.equal_once_cut.append(pair.place)
        else:
            self.pairs.append(pair)

    def columns(self) -> dict[str, list[Any]]:
        """Return the table that TRL's trainer takes."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {name: [np.asarray(getattr(pair, name)) for pair in self.pairs] for name in names}

    def check(self, path: str) -> None:
        """Raise InputError if no pair is left to train on."""
        if self.pairs:
            return
        limit = f"dpo.max_length ({self.max_length} tokens)"
        if not self.equal and not self.equal_once_cut:
            raise InputError(f"every prompt alone fills {limit}", where=path, mend="raise dpo.max_length in the recipe")
        raise InputError(
            f"no pair is left to train on: {len(self.equal_once_cut)} have equal answers once they are cut to {limit}, "
            f"{len(self.equal)} are the same tokens as they are, and the prompt alone of {len(self.filled)} fills it",
            where=path,
            mend="raise dpo.max_length in the recipe"
            if self.equal_once_cut or self.filled
            else "give answers that the base's chat template renders differently",
        )

    def changes(self) -> dict[str, Any]:
        """Return what decides about resuming beside the file's digest: how its pairs were read."""
        carried = sorted(self.carried - self.unrendered.keys())
        num_equal = len(self.equal) + len(self.equal_once_cut)
        return ({"num_equal_pairs": num_equal} if num_equal else {}) | ({"message_keys": carried} if carried else {})

    def notes(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> list[str]:
        """Return what the reader should know before the training begins."""
        limit = f"dpo.max_length ({self.max_length})"
        num_cut = sum(pair.num_cut(self.max_length) for pair in self.pairs)
        notes = [
            (len(self.filled), f"{_pairs(self.filled)} left out: the prompt alone fills {limit}"),
            (
                len(self.equal_once_cut),
                f"{_pairs(self.equal_once_cut)} left out: once cut to {limit} both answers are equal "
                f"({_first(self.equal_once_cut)})",
            ),
            (
                len(self.equal),
                f"{_pairs(self.equal)} left out: both answers are the same tokens ({_first(self.equal)})",
            ),
            (num_cut, f"{num_cut} of {2 * len(self.pairs)} answers are longer than {limit} and lose their end"),
            (
                len(self.reshaped),
                f"{_pairs(self.reshaped)} trained on a part of the prompt, too: the chat template renders it "
                f"differently once an answer follows ({_first(self.reshaped)})",
            ),
        ]
        notes += [
            (num, f"the chat template does not render the key {key!r} of messages (pairs: {num}); it is ignored")
            for key, num in sorted(self.unrendered.items())
        ]
        return [text for num, text in notes if num] + self._end_notes(tokenizer, stop_ids)

    def _end_notes(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> list[str]:
        """Return a note if chosen answers end without an end token: their expert would not learn to stop."""
        endless = [pair for pair in self.pairs if not _ends(pair.chosen_ids, tokenizer, stop_ids)]
        if not endless:
            return []
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stop_ids))
        mend = "; write {{ eos_token }} there in the template" if self.is_chat else ""
        behind = " in the chat template" if self.is_chat else ""
        return [
            f"no end token ({names}) follows {len(endless)} of {len(self.pairs)} chosen answers{behind}: the expert "
            f"does not learn to end an answer{mend}"
        ]


def encode_pairs(preferences: Preferences, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> EncodedPairs:
    """Return the pairs as token ids, those with shorter answers first, cut to nothing yet.

    Raises:
        InputError: naming file and line: the chat template refuses the messages, or has no place for what was said;
            or no pair is left to train on.
    """
    encoded = EncodedPairs(max_length, preferences.conversational)
    order = sorted(range(len(preferences.pairs)), key=lambda index: _num_characters(preferences.pairs[index]))
    for index in order:
        pair, place = preferences.pairs[index], preferences.place(index)
        if preferences.conversational:
            encoded.add(_encode_chat(pair, tokenizer, place, encoded))
        else:
            encoded.add(_encode_text(pair, tokenizer, place))
    encoded.check(str(preferences.path))
    return encoded


def check_pairs(encoded: EncodedPairs, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> None:
    """Raise InputError, naming file and line, if a pair holds a token that the base has no embedding for."""
    for pair in encoded.pairs:
        for ids in pair.cut(encoded.max_length):
            check_tokens(ids, tokenizer, num_embeddings, where=pair.place)


def _encode_text(pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str) -> EncodedPair:
    end = str(tokenizer.eos_token)
    answers = [text if text.endswith(end) else text + end for text in (pair["chosen"], pair["rejected"])]
    texts = (pair["prompt"], *(pair["prompt"] + answer for answer in answers))
    return _split(*(list(tokenizer(text=text, verbose=False)["input_ids"]) for text in texts), place=place)


def _encode_chat(pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str, encoded: EncodedPairs) -> EncodedPair:
    chat = _Chat(pair, tokenizer, place)
    chosen, rejected = pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]
    keys = further_keys(chosen) | further_keys(rejected)
    encoded.carried |= keys | ({"tools"} if chat.tools else set())
    for key in sorted(keys):
        if not (chat.renders(key, chosen) or chat.renders(key, rejected)):
            encoded.unrendered[key] += 1
    chat.check_tools(chosen)
    prompt_ids = chat.ids(pair["prompt"], add_generation_prompt=True)
    found = _split(prompt_ids, chat.ids(chosen), chat.ids(rejected), place=place)
    if len(found.prompt_ids) < len(prompt_ids) and chat.is_reshaped(pair["prompt"], (chosen, rejected)):
        encoded.reshaped.append(place)
    return found


class _Chat:
    """The chat template, for one pair."""

    def __init__(self, pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str) -> None:
        self.tools = pair.get("tools")
        self._tokenizer = tokenizer
        self._place = place

    def ids(self, messages: Sequence[Message], **options: Any) -> list[int]:
        """Return the token ids of messages."""
        return list(self._apply(messages, tokenize=True, return_dict=True, **options)["input_ids"])

    def text(self, messages: Sequence[Message], **options: Any) -> str:
        """Return messages as text."""
        return str(self._apply(messages, tokenize=False, **options))

    def renders(self, key: str, messages: Sequence[Message]) -> bool:
        """Return whether the template has a place for a key of messages.

        Raises:
            InputError: if it has none, and the key holds what was said.
        """
        if not any(key in message for message in messages):
            return False
        if self._names(key):
            return True
        without = [{name: value for name, value in message.items() if name != key} for message in messages]
        if self.text(without) != self.text(messages):
            return True
        if key in SPOKEN_KEYS:
            raise self._lost(f"a message has {key!r}, which the base's chat template does not render", key)
        return False

    def is_reshaped(self, prompt: Sequence[Message], wholes: Sequence[Sequence[Message]]) -> bool:
        """Return whether prompt and whole texts diverge before the prompt's last message ends."""
        said = prompt[-1]["content"].strip()
        before = self.text(prompt, add_generation_prompt=True)
        start = before.rfind(said)
        return start >= 0 and any(_num_common(before, self.text(whole)) < start + len(said) for whole in wholes)

    def check_tools(self, messages: Sequence[Message]) -> None:
        """Raise InputError if there are tools, and the template has no place for them."""
        if not self.tools or self._names("tools"):
            return
        untold = _Chat({}, self._tokenizer, self._place)
        if untold.text(messages) == self.text(messages):
            raise self._lost("the pair has 'tools', which the base's chat template does not render", "tools")

    def _names(self, key: str) -> bool:
        """Return whether the template names a key, or a variable of that name."""
        with template_faults(self._place):
            template = _COMMENT.sub("", str(self._tokenizer.get_chat_template(tools=self.tools)))
        if key == "tools":
            return re.search(r"\btools\b", template) is not None
        names = "|".join(map(re.escape, _REASONING_KEYS if key in _REASONING_KEYS else [key]))
        return re.search(rf"\.(?:{names})\b|(['\"])(?:{names})\1", template) is not None

    def _lost(self, what: str, key: str) -> InputError:
        return InputError(
            f"{what}: it would be lost",
            where=self._place,
            mend=f"use a base whose chat template renders {key!r}, or take it out of the data",
        )

    def _apply(self, messages: Sequence[Message], **options: Any) -> Any:
        """Return what the template makes of messages.

        Most templates take a call's arguments as an object, and would write OpenAI's JSON text as a text in quotes;
        some take the text alone.
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
    """Return a message whose tool calls have their arguments as objects where they are the JSON text of one."""
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


def _split(prompt_ids: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], *, place: str) -> EncodedPair:
    """Return the pair; as in TRL, the completion begins where the prompt's tokens and either text's diverge."""
    length = min(_num_common(prompt_ids, chosen), _num_common(prompt_ids, rejected))
    return EncodedPair(
        array("i", prompt_ids[:length]), array("i", chosen[length:]), array("i", rejected[length:]), place
    )


def _num_common(ids: Sequence[object], other: Sequence[object]) -> int:
    shortest = min(len(ids), len(other))
    return next((place for place in range(shortest) if ids[place] != other[place]), shortest)


def _ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> bool:
    """Return whether the last token that is more than white space ends an answer."""
    last = next((token for token in reversed(ids) if str(tokenizer.decode([token])).strip()), None)
    return last in stop_ids


def _pairs(places: Sequence[str]) -> str:
    return "1 pair is" if len(places) == 1 else f"{len(places)} pairs are"


def _first(places: Sequence[str]) -> str:
    return f"the first is {min(places, key=lambda place: int(place.rpartition(':')[2]))}" if places else ""


def _num_characters(pair: Pair) -> int:
    """Return a measure of a pair's length, so that batches of the reference pass hold little padding."""

    def measure(answer: str | list[Message]) -> int:
        if isinstance(answer, str):
            return len(answer)
        return len(str([{"role": message["role"], "content": message["content"]} for message in answer]))

    return max(measure(pair["chosen"]), measure(pair["rejected"]))
