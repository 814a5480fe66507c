"""Encode preference pairs as token ids, leave out pairs that cannot be trained, and write notes for the user.

The ids equal those of TRL's DPOTrainer. They are computed here for two reasons: errors of a chat template name file and
line, and nested values such as tool calls reach the template unchanged. TRL stores messages in a table of `datasets`,
which gives every message the keys of all other messages.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
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
    """One pair as token ids of 4 bytes.

    A text is the prompt with an answer. The prompt's ids end where they diverge from those of either text.

    Args:
        prompt_ids: the ids that the prompt and both texts have in common at their start.
        chosen_ids: the rest of the text with the chosen answer.
        rejected_ids: the rest of the text with the rejected answer.
        place: the file and line of the pair.
        user: the id of the user who compared the answers, if the pair names one.
    """

    prompt_ids: array[int]
    chosen_ids: array[int]
    rejected_ids: array[int]
    place: str
    user: str | None = None

    def cut(self, max_length: int) -> tuple[array[int], array[int]]:
        """Return the ids of the chosen and of the rejected text, cut to `max_length` tokens as in the trainer."""
        return (self.prompt_ids + self.chosen_ids)[:max_length], (self.prompt_ids + self.rejected_ids)[:max_length]

    def num_cut(self, max_length: int) -> int:
        """Return how many of the two texts are longer than `max_length` tokens."""
        answers = (self.chosen_ids, self.rejected_ids)
        return sum(len(self.prompt_ids) + len(answer) > max_length for answer in answers)


@dataclass(slots=True)
class EncodedPairs:
    """The pairs of one file as token ids.

    Args:
        max_length: the maximum number of tokens of prompt and answer together. Longer texts are cut.
        is_chat: whether a chat template rendered the texts.
        pairs: the pairs to train on, shortest first.
        filled: the places of pairs that are left out because the prompt alone has `max_length` tokens or more.
        equal: the places of pairs that are left out because both texts have the same tokens.
        equal_once_cut: the places of pairs that are left out because both texts, once cut, have the same tokens.
        reshaped: the places of pairs whose prompt the template renders differently when an answer follows.
        carried: the keys of messages, other than role and content, that the template received. `tools` is included if
            a pair has tools.
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
        """Add a pair to `pairs`. A pair that must be left out is counted under its reason instead."""
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
        """Return the pairs as the columns of a table for TRL's trainer."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {name: [np.asarray(getattr(pair, name)) for pair in self.pairs] for name in names}

    def check(self, path: str) -> None:
        """Raise InputError if no pair is left to train on."""
        if self.pairs:
            return
        limit = f"dpo.max_length ({self.max_length} tokens)"
        if not self.equal and not self.equal_once_cut:
            raise InputError(
                f"every prompt alone fills {limit}, which leaves no room for an answer",
                where=path,
                mend=f"raise dpo.max_length in the recipe, e.g. to {2 * self.max_length}",
            )
        raise InputError(
            f"no pair is left to train on: {len(self.equal_once_cut)} pairs have equal answers once cut to {limit}, "
            f"{len(self.equal)} have equal answers before the cut, and {len(self.filled)} have a prompt that alone "
            "fills dpo.max_length",
            where=path,
            mend=f"raise dpo.max_length in the recipe, e.g. to {2 * self.max_length}"
            if self.equal_once_cut or self.filled
            else "give answers that the base's chat template renders differently",
        )

    def changes(self) -> dict[str, Any]:
        """Return facts on how the pairs were encoded. A resumed training must have the same facts."""
        carried = sorted(self.carried - self.unrendered.keys())
        num_equal = len(self.equal) + len(self.equal_once_cut)
        return ({"num_equal_pairs": num_equal} if num_equal else {}) | ({"message_keys": carried} if carried else {})

    def notes(self, tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> list[str]:
        """Return notes for the user on pairs that are left out, cut or changed, and on missing end tokens."""
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
        """Return a note if chosen answers lack an end token, since the expert would not learn to end an answer."""
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
    """Return the pairs as token ids, which are not yet cut. Pairs with the shortest answers come first.

    Raises:
        InputError: if the chat template rejects the messages or does not render a part of what was said, or if no pair
            is left to train on.
    """
    encoded = EncodedPairs(max_length, preferences.conversational)
    order = sorted(range(len(preferences.pairs)), key=lambda index: _num_characters(preferences.pairs[index]))
    for index in order:
        pair, place = preferences.pairs[index], preferences.place(index)
        if preferences.conversational:
            ids = _encode_chat(pair, tokenizer, place, encoded)
        else:
            ids = _encode_text(pair, tokenizer, place)
        encoded.add(replace(ids, user=pair.get("user")))
    encoded.check(str(preferences.path))
    return encoded


def check_pairs(encoded: EncodedPairs, tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> None:
    """Raise InputError, with file and line, if the base has no embedding for a token of a pair."""
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
    """Return the pair. As in TRL, the answers begin where the prompt's tokens diverge from those of either text."""
    length = min(num_common(prompt_ids, chosen), num_common(prompt_ids, rejected))
    return EncodedPair(
        array("i", prompt_ids[:length]), array("i", chosen[length:]), array("i", rejected[length:]), place
    )


def _ends(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_ids: Collection[int]) -> bool:
    """Return whether the last token that is not white space ends an answer."""
    last = next((token for token in reversed(ids) if str(tokenizer.decode([token])).strip()), None)
    return last in stop_ids


def _pairs(places: Sequence[str]) -> str:
    return "1 pair is" if len(places) == 1 else f"{len(places)} pairs are"


def _first(places: Sequence[str]) -> str:
    return f"the first is {min(places, key=lambda place: int(place.rpartition(':')[2]))}" if places else ""


def _num_characters(pair: Pair) -> int:
    """Return the number of characters of the longer answer.

    Sorting by this number leaves little padding in the batches of the reference pass.
    """

    def measure(answer: str | list[Message]) -> int:
        if isinstance(answer, str):
            return len(answer)
        return len(str([{"role": message["role"], "content": message["content"]} for message in answer]))

    return max(measure(pair["chosen"]), measure(pair["rejected"]))
