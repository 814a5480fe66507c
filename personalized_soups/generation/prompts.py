"""Read prompts from files, check them, and encode them as token ids. A prompt is a text or a chat."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from personalized_soups.errors import InputError
from personalized_soups.files.regular import check_no_lfs_pointer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | Sequence[Message]

# A template computes with the messages as Python would, so it may raise these errors in addition to jinja's own.
# transformers raises ValueError if a tokenizer has several templates and none of them is the default.
_TEMPLATE_FAULTS = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError)


def messages_of(prompt: Prompt) -> list[Message]:
    """Return the prompt as chat messages. A text becomes one message of the user."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    return [dict(message) for message in prompt]


def prompt_text(prompt: Prompt) -> str:
    """Return the text that scorers read: the prompt itself, or the last message of a chat."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def with_text_before(prompt: Prompt, text: str) -> Prompt:
    """Return the prompt with a text before it and an empty line between them.

    In a chat, the text is put before the first message of the role `user`, or before the first message if there is no
    such message. An empty text changes nothing.
    """
    if not text:
        return prompt
    if isinstance(prompt, str):
        return f"{text}\n\n{prompt}"
    messages = [dict(message) for message in prompt]
    first = next((index for index, message in enumerate(messages) if message["role"] == "user"), 0)
    messages[first]["content"] = f"{text}\n\n{messages[first]['content']}"
    return messages


@contextmanager
def template_faults(where: str) -> Iterator[None]:
    """Raise InputError for any error that a chat template raises while the block runs."""
    from jinja2.exceptions import TemplateError, TemplateSyntaxError

    try:
        yield
    except TemplateSyntaxError as fault:
        raise InputError(
            f"the base's chat template can't be read: {fault.message} (line {fault.lineno})",
            where=where,
            mend="fix the template in chat_template.jinja or tokenizer_config.json in the base's folder",
        ) from fault
    except (TemplateError, *_TEMPLATE_FAULTS) as fault:
        raise InputError(
            f"the base's chat template rejects the messages: {str(fault) or type(fault).__name__}",
            where=where,
            mend="give messages with the roles, order and keys that the template accepts, or use another chat template",
        ) from fault


def check_tokens(
    tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None, *, where: str
) -> None:
    """Raise InputError if the base has no embedding for a token. With `num_embeddings` None, nothing is checked."""
    if num_embeddings is not None and tokens and max(tokens) >= num_embeddings:
        token = max(tokens)
        name = tokenizer.convert_ids_to_tokens(token)
        raise InputError(
            f"the base has no token {token} ({name!r}): it has {num_embeddings} tokens",
            where=where,
            mend="use the base's own tokenizer, or enlarge the base's embedding: "
            "model.resize_token_embeddings(len(tokenizer))",
        )


def prompt_place(prompt: Prompt) -> str:
    """Return the place that errors name for a prompt that is not from a file."""
    return f"the prompt that begins {prompt_text(prompt)[:40]!r}"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt, *, where: str | None = None) -> list[int]:
    """Return the token ids of a prompt. The answer begins after them.

    Args:
        tokenizer: the base's tokenizer.
        prompt: a text or a chat.
        where: the prompt's place, for errors. By default, errors quote the prompt's first words.

    Raises:
        InputError: if the chat template rejects the prompt, or if the prompt is a chat and there is no template.
    """
    if tokenizer.chat_template is not None:
        with template_faults(where or prompt_place(prompt)):
            rendered = tokenizer.apply_chat_template(messages_of(prompt), tokenize=False, add_generation_prompt=True)
        # The template writes the special tokens. The tokenizer would add the first special token a second time.
        return list(tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"])
    if not isinstance(prompt, str):
        raise InputError(
            "the prompt is a chat, but the tokenizer has no chat template",
            where=str(tokenizer.name_or_path),
            mend="give the prompt as plain text, or use a base model with a chat template",
        )
    return list(tokenizer(prompt)["input_ids"])


def check_text(prompt: str, *, where: str) -> None:
    """Raise InputError if a prompt is empty or cannot be encoded as UTF-8, e.g. if it has half a surrogate pair."""
    if not prompt.strip():
        raise InputError("the prompt is empty", where=where, mend="write a prompt with text")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as fault:
        raise InputError(
            f"the prompt is not UTF-8: it has {fault.object[fault.start]!r} at character {fault.start + 1}",
            where=where,
            mend="write the prompt as UTF-8 text",
        ) from fault


@dataclass(frozen=True, slots=True)
class PromptRequest:
    """One prompt of a file.

    Attributes:
        prompt: the text.
        user: the user who asks, or None if the line names no user.
        where: the file and the line.
    """

    prompt: str
    user: str | None
    where: str


def read_prompts(path: Path) -> list[str]:
    """Return the prompts of a file.

    Each line of a `.jsonl` file is a JSON object with a string `prompt`. Each line of another file is a prompt. Blank
    lines are skipped.

    Raises:
        InputError: if the file is missing, empty or not UTF-8, or if a JSON line has no prompt.
    """
    return [request.prompt for request in read_asked_prompts(path)]


def read_asked_prompts(path: Path) -> list[PromptRequest]:
    """Return the prompts of a file with their users. A JSON line may name its `user`.

    Raises:
        InputError: if `read_prompts` would raise it, or if a user is not a string.
    """
    prompts = [_prompt_of(line, path=path, number=number) for number, line in prompt_lines(path)]
    if not prompts:
        raise InputError("the file holds no prompts", where=str(path), mend="write one prompt on each line")
    return prompts


def prompt_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number and the bytes of each line that is not blank. The first line has number 1.

    Raises:
        InputError: if the file cannot be read, or is a Git LFS pointer.
    """
    try:
        content = path.read_bytes()
    except OSError as fault:
        raise InputError(
            f"the prompts can't be read: {fault.strerror}", where=str(path), mend="check the path"
        ) from fault
    check_no_lfs_pointer(content, path)
    yield from ((number, line) for number, line in enumerate(content.split(b"\n"), start=1) if line.strip())


def _prompt_of(line: bytes, *, path: Path, number: int) -> PromptRequest:
    where = f"{path}:{number}"
    try:
        text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as fault:
        raise InputError(
            f"the byte {line[fault.start]:#04x} is not UTF-8", where=where, mend="save the file as UTF-8"
        ) from fault
    if path.suffix != ".jsonl":
        check_text(text, where=where)
        return PromptRequest(text, None, where)
    try:
        row = json.loads(text)
        prompt, user = row["prompt"], row.get("user")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        prompt = user = None
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(
            'the line is not a JSON object with a string "prompt"',
            where=where,
            mend='write {"prompt": "..."} on every line',
        )
    check_text(prompt, where=where)
    if user is not None and not isinstance(user, str):
        raise InputError(
            f'"user" must be a string, but is {user!r}', where=where, mend='write "user": "u1042", or remove "user"'
        )
    return PromptRequest(prompt, user, where)
