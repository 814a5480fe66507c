"""Preference pairs as token ids: the pairs to train on, the pairs left out, and notes on both for the reader.

The ids equal those of TRL's DPOTrainer. They are computed here for two reasons: a template's error then names file and
line, and nested values (tool calls) reach the template as the file holds them. A table of `datasets` would give every
message the keys of all others.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import check_tokens
from personalized_soups.training.chat_renderer import ChatRenderer, num_common
from personalized_soups.training.data import Pair, Preferences
from personalized_soups.training.messages import Message, further_keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One pair as token ids (4 bytes each). The answer begins where the prompt and the whole texts diverge.

    Args:
        prompt_ids: the common start of both texts, at most the prompt.
        chosen_ids: the rest of the chosen text.
        rejected_ids: the rest of the rejected text.
        place: file and line.
    """

    prompt_ids: array[int]
    chosen_ids: array[int]
    rejected_ids: array[int]
    place: str

    def cut(self, max_length: int) -> tuple[array[int], array[int]]:
        """Return both texts, cut to `max_length` tokens as the trainer cuts them."""
        return (self.prompt_ids + self.chosen_ids)[:max_length], (self.prompt_ids + self.rejected_ids)[:max_length]

    def num_cut(self, max_length: int) -> int:
        """Return how many of the two texts `max_length` shortens."""
        answers = (self.chosen_ids, self.rejected_ids)
        return sum(len(self.prompt_ids) + len(answer) > max_length for answer in answers)


@dataclass(slots=True)
class EncodedPairs:
    """The pairs of one file as token ids.

    Args:
        max_length: most tokens of prompt and answer together; longer texts are cut.
        is_chat: whether a chat template rendered the texts.
        pairs: the pairs to train on, shortest first.
        filled: places of pairs left out because the prompt alone has `max_length` tokens or more.
        equal: places of pairs left out because both texts are the same tokens.
        equal_once_cut: places of pairs left out because both texts are the same tokens once they are cut.
        reshaped: places of pairs whose prompt the template renders differently when an answer follows.
        carried: keys of messages, other than role and content, that the template received.
        unrendered: the keys in `carried` that the template does not render, with the number of pairs.
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
        """Add a pair to `pairs`, or its place to the list that gives the reason for leaving it out."""
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
        """Return the pairs as columns, for TRL's trainer."""
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
            f"no pair is left to train on: {len(self.equal_once_cut)} have equal answers once cut to {limit}, "
            f"{len(self.equal)} have equal answers before the cut, and {len(self.filled)} have a prompt that fills it",
            where=path,
            mend="raise dpo.max_length in the recipe"
            if self.equal_once_cut or self.filled
            else "give answers that the base's chat template renders differently",
        )

    def changes(self) -> dict[str, Any]:
        """Return facts that a resumed training must share, in addition to the file's digest: how pairs were read."""
        carried = sorted(self.carried - self.unrendered.keys())
        num_equal = len(self.equal) + len(self.equal_once_cut)
        return ({"num_equal_pairs": num_equal} if num_equal else {}) | ({"message_keys": carried} if carried else {})

    def notes(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> list[str]:
        """Return notes for the user, to print before the training begins."""
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
                f"{_pairs(self.reshaped)} trained on a part of the prompt, too: the chat template renders the prompt "
                f"differently when an answer follows ({_first(self.reshaped)})",
            ),
        ]
        notes += [
            (num, f"the chat template does not render the key {key!r} of messages (pairs: {num}); it is ignored")
            for key, num in sorted(self.unrendered.items())
        ]
        return [text for num, text in notes if num] + self._end_notes(tokenizer, stop_ids)

    def _end_notes(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> list[str]:
        """Return a note if chosen answers lack an end token: the expert would not learn to stop."""
        endless = [pair for pair in self.pairs if not _ends(pair.chosen_ids, tokenizer, stop_ids)]
        if not endless:
            return []
        names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in sorted(stop_ids))
        fix = "; write {{ eos_token }} there in the template" if self.is_chat else ""
        source = " in the chat template" if self.is_chat else ""
        return [
            f"no end token ({names}) follows {len(endless)} of {len(self.pairs)} chosen answers{source}: the expert "
            f"does not learn to end an answer{fix}"
        ]


def encode_pairs(preferences: Preferences, tokenizer: PreTrainedTokenizerBase, *, max_length: int) -> EncodedPairs:
    """Return the pairs as token ids, those with the shortest answers first, not yet cut.

    Raises:
        InputError: if the chat template rejects the messages or does not render a part of what was said (with file and
            line), or if no pair is left to train on.
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
    """Raise InputError, with file and line, if a pair holds a token without an embedding in the base."""
    for pair in encoded.pairs:
        for ids in pair.cut(encoded.max_length):
            check_tokens(ids, tokenizer, num_embeddings, where=pair.place)


def _encode_text(pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str) -> EncodedPair:
    end = str(tokenizer.eos_token)
    answers = [text if text.endswith(end) else text + end for text in (pair["chosen"], pair["rejected"])]
    texts = (pair["prompt"], *(pair["prompt"] + answer for answer in answers))
    return _split(*(list(tokenizer(text=text, verbose=False)["input_ids"]) for text in texts), place=place)


def _encode_chat(pair: Pair, tokenizer: PreTrainedTokenizerBase, place: str, encoded: EncodedPairs) -> EncodedPair:
    chat = ChatRenderer(pair, tokenizer, place)
    chosen, rejected = pair["prompt"] + pair["chosen"], pair["prompt"] + pair["rejected"]
    keys = further_keys(chosen) | further_keys(rejected)
    encoded.carried |= keys | ({"tools"} if chat.tools else set())
    for key in sorted(keys):
        if not (chat.renders(key, chosen) or chat.renders(key, rejected)):
            encoded.unrendered[key] += 1
    chat.check_tools(chosen)
    prompt_ids = chat.ids(pair["prompt"], add_generation_prompt=True)
    split = _split(prompt_ids, chat.ids(chosen), chat.ids(rejected), place=place)
    if len(split.prompt_ids) < len(prompt_ids) and chat.is_reshaped(pair["prompt"], (chosen, rejected)):
        encoded.reshaped.append(place)
    return split


def _split(prompt_ids: Sequence[int], chosen: Sequence[int], rejected: Sequence[int], *, place: str) -> EncodedPair:
    """Return the pair. As in TRL, the answer begins where the prompt's tokens diverge from either text's."""
    length = min(num_common(prompt_ids, chosen), num_common(prompt_ids, rejected))
    return EncodedPair(
        array("i", prompt_ids[:length]), array("i", chosen[length:]), array("i", rejected[length:]), place
    )


def _ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> bool:
    """Return whether the last token, white space aside, ends an answer."""
    last = next((token for token in reversed(ids) if str(tokenizer.decode([token])).strip()), None)
    return last in stop_ids


def _pairs(places: Sequence[str]) -> str:
    return "1 pair is" if len(places) == 1 else f"{len(places)} pairs are"


def _first(places: Sequence[str]) -> str:
    return f"the first is {min(places, key=lambda place: int(place.rpartition(':')[2]))}" if places else ""


def _num_characters(pair: Pair) -> int:
    """Return the longer answer's characters: sorting by it leaves little padding in the reference pass's batches."""

    def measure(answer: str | list[Message]) -> int:
        if isinstance(answer, str):
            return len(answer)
        return len(str([{"role": message["role"], "content": message["content"]} for message in answer]))

    return max(measure(pair["chosen"]), measure(pair["rejected"]))
