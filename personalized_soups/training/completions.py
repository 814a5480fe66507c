"""Read prompts with completions from JSON Lines, and encode them as token ids for SFT."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from personalized_soups.declare.json_lines import LineKind, json_object, text_lines
from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import check_tokens
from personalized_soups.training.chat_renderer import ChatRenderer, num_common
from personalized_soups.training.messages import Message, check_answer, further_keys, read_messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KIND = LineKind("prompt with a completion", '{"prompt": "...", "completion": "..."}')
_MEND = f"write {_KIND.example}"


@dataclass(frozen=True, slots=True)
class Completion:
    """A prompt and the answer to learn, as texts or as messages.

    Attributes:
        prompt, answer: the prompt and the answer.
        place: the file and line.
    """

    prompt: str | list[Message]
    answer: str | list[Message]
    place: str


@dataclass(slots=True)
class EncodedCompletions:
    """Completions as token ids.

    Attributes:
        texts: the ids of prompt and answer together, cut to the maximum length.
        prompt_lengths: how many ids of each text are the prompt's, which enter no loss.
        filled: the places of lines that are left out because the prompt alone fills the maximum length.
        num_cut: the number of answers that lose their end.
    """

    texts: list[array[int]] = field(default_factory=list)
    prompt_lengths: list[int] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)
    num_cut: int = 0

    def columns(self) -> dict[str, list[list[int]]]:
        """Return the columns of TRL's data set: `input_ids` and `labels`, which are -100 for the prompt."""
        labels = [
            [-100] * length + list(text[length:]) for text, length in zip(self.texts, self.prompt_lengths, strict=True)
        ]
        return {"input_ids": [list(text) for text in self.texts], "labels": labels}

    def notes(self, max_length: int) -> list[str]:
        """Return notes for the user on lines that are left out or cut."""
        limit = f"sft.max_length ({max_length})"
        counts = [
            (len(self.filled), f"{len(self.filled)} lines are left out: the prompt alone fills {limit}"),
            (self.num_cut, f"{self.num_cut} answers are longer than {limit} and lose their end"),
        ]
        return [text for count, text in counts if count]


def read_completions(path: Path) -> list[Completion]:
    """Return the completions of a file. All lines must be plain text, or all conversations.

    A line has `prompt` and `completion`; or `messages`, of which the last is the answer; or it is a preference pair, of
    which `chosen` is the answer.

    Raises:
        DeclarationError: if the file cannot be read, or a line is not UTF-8 or not a JSON object.
        InputError: if a field is missing, empty or of another type, an answer is not the assistant's, or the file mixes
            plain text and conversations.
    """
    rows: list[Completion] = []
    for where, line in text_lines(path):
        row = _completion(json_object(line, where, _KIND), where)
        if rows and isinstance(row.prompt, str) != isinstance(rows[0].prompt, str):
            raise InputError(
                "the file mixes plain text and conversations: this line has one, but the lines above have the other",
                where=where,
                mend="write all lines as strings, or all as lists of messages",
            )
        rows.append(row)
    if not rows:
        raise InputError("the file holds no completions", where=str(path), mend=_MEND)
    return rows


def encode_completions(
    rows: Sequence[Completion], tokenizer: PreTrainedTokenizerBase, *, max_length: int, num_embeddings: int | None
) -> EncodedCompletions:
    """Return the completions as token ids. Those with the shortest answers come first.

    Raises:
        InputError: if there is no chat template for conversations, the template rejects messages or does not render a
            part of them, the base lacks an embedding for a token, or every prompt fills `max_length`.
    """
    encoded = EncodedCompletions()
    for row in sorted(rows, key=lambda row: len(str(row.answer))):
        prompt, whole = _ids(row, tokenizer)
        start = num_common(prompt, whole)
        check_tokens(whole[:max_length], tokenizer, num_embeddings, where=row.place)
        if start >= max_length:
            encoded.filled.append(row.place)
            continue
        encoded.num_cut += len(whole) > max_length
        encoded.texts.append(array("i", whole[:max_length]))
        encoded.prompt_lengths.append(start)
    if not encoded.texts:
        raise InputError(
            f"every prompt alone fills sft.max_length ({max_length} tokens), which leaves no room for an answer",
            where=encoded.filled[0],
            mend=f"raise sft.max_length in the recipe, e.g. to {2 * max_length}",
        )
    return encoded


def _completion(row: dict[str, Any], where: str) -> Completion:
    if "messages" in row:
        messages = read_messages(_list(row["messages"], "messages", where), "messages", where)
        check_answer(messages[-1:], "messages", where)
        if len(messages) < 2:
            raise InputError("`messages` has an answer but no prompt", where=where, mend=_MEND)
        return Completion(messages[:-1], messages[-1:], where)
    name = "completion" if "completion" in row else "chosen"
    for needed in ("prompt", name):
        if needed not in row:
            shown = "completion" if needed == name else needed
            raise InputError(f"the field {shown!r} is missing", where=where, mend=_MEND)
    prompt, answer = row["prompt"], row[name]
    if isinstance(prompt, list) or isinstance(answer, list):
        read = read_messages(_list(prompt, "prompt", where), "prompt", where)
        said = read_messages(_list(answer, name, where), name, where)
        check_answer(said, name, where)
        return Completion(read, said, where)
    for text, needed in ((prompt, "prompt"), (answer, name)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"`{needed}` is empty or not text", where=where, mend=_MEND)
    return Completion(prompt, answer, where)


def _list(value: object, name: str, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise InputError(
            f"`{name}` is not a list of messages", where=where, mend="write all fields as messages, or as text"
        )
    return value


def _ids(row: Completion, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids of the prompt, and those of the prompt with the answer."""
    if isinstance(row.prompt, str):
        end = str(tokenizer.eos_token)
        whole = f"{row.prompt}{row.answer}"
        whole = whole if whole.endswith(end) else whole + end
        prompt, text = (list(tokenizer(text=text, verbose=False)["input_ids"]) for text in (row.prompt, whole))
        return prompt, text
    if tokenizer.chat_template is None:
        raise InputError(
            "the lines are conversations, but the base's tokenizer has no chat template",
            where=row.place,
            mend="write the lines as plain text, or set tokenizer.chat_template and save the tokenizer with the base",
        )
    chat = ChatRenderer({}, tokenizer, row.place)
    messages = [*row.prompt, *row.answer]
    for key in sorted(further_keys(messages)):
        chat.renders(key, messages)  # raises if a part of what was said is lost
    return chat.ids(row.prompt, add_generation_prompt=True), chat.ids(messages)
