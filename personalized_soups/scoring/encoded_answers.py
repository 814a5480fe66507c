"""Encode a prompt with its answer as token ids, as the training of experts does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from personalized_soups.errors import InputError
from personalized_soups.generation.prompts import (
    Prompt,
    check_tokens,
    encode_prompt,
    messages_of,
    prompt_place,
    template_faults,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class EncodedAnswer:
    """A prompt with an answer as token ids.

    Attributes:
        ids: the ids of the prompt and the answer, with the end token that follows the answer.
        num_answer: the number of ids at the end of `ids` that belong to the answer. It is less than the length of
            `ids`, because a model predicts a token from the tokens before it.
    """

    ids: tuple[int, ...]
    num_answer: int


def encode_answer(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str,
    *,
    num_embeddings: int | None = None,
    max_tokens: int | None = None,
    ended: bool = True,
) -> EncodedAnswer:
    """Return the token ids of a prompt with an answer. They equal those of the training of experts.

    The chat template renders both as a conversation. Without a template, the answer and the end token follow the prompt
    directly. The answer begins where the ids of both diverge from those of the prompt alone, as in TRL's DPOTrainer.

    Args:
        tokenizer: the base's tokenizer.
        prompt: a text or a chat.
        answer: the text of the answer.
        num_embeddings: the number of tokens of the base, or None if it is unknown.
        max_tokens: the maximum number of tokens that the base takes, or None if it is unknown.
        ended: whether the end token follows the answer. If not, the ids are those of an answer that is cut off.

    Raises:
        InputError: if the chat template rejects the conversation, or if the base has no embedding for a token or cannot
            take as many tokens.
    """
    where = prompt_place(prompt)
    start = encode_prompt(tokenizer, prompt, where=where)
    if tokenizer.chat_template is not None:
        with template_faults(where):
            messages = messages_of(prompt)
            if ended:
                messages.append({"role": "assistant", "content": answer})
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=not ended))
            text = text if ended else text + answer
        whole = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    else:  # `encode_prompt` has rejected a chat
        end = str(tokenizer.eos_token)
        text = answer if answer.endswith(end) or not ended else answer + end
        whole = list(tokenizer(f"{prompt}{text}", verbose=False)["input_ids"])
    check_tokens(whole, tokenizer, num_embeddings, where=where)
    if max_tokens is not None and len(whole) > max_tokens:
        raise InputError(
            f"the prompt and the answer have {len(whole)} tokens, but the model takes at most {max_tokens}",
            where=where,
            mend="shorten the prompt or the answer, or use a base model with a longer context",
        )
    num_prompt = 0
    for prompt_id, whole_id in zip(start, whole, strict=False):
        if prompt_id != whole_id:
            break
        num_prompt += 1
    return EncodedAnswer(tuple(whole), len(whole) - max(1, num_prompt))
