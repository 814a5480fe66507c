"""Prompts with answers as token ids, compared with those on which experts are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from personalized_soups import TINY_BASE
from personalized_soups.errors import InputError
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.scoring.encoded_answers import encode_answer
from personalized_soups.training.data import read_preferences, write_pairs
from personalized_soups.training.encoding import encode_pairs

PROMPT = "How do I wash the old kettle?"
ANSWERS = ("Wash it with soap.", "Rub it dry; then rub it again.")
# ChatML ends with a line break after the end token, which is trained, too.
CHATML = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|eos|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def trained_ids(folder: Path, tokenizer: Any, *, is_chat: bool) -> list[tuple[tuple[int, ...], int]]:
    """The ids of both texts of a pair, and the number of ids of each answer, as training has them."""

    def said(role: str, text: str) -> Any:
        return [{"role": role, "content": text}] if is_chat else text

    row = {
        "prompt": said("user", PROMPT),
        "chosen": said("assistant", ANSWERS[0]),
        "rejected": said("assistant", ANSWERS[1]),
    }
    write_pairs(folder / "pairs.jsonl", [row])
    (pair,) = encode_pairs(read_preferences(folder / "pairs.jsonl"), tokenizer, max_length=4096).pairs
    answers = (pair.chosen_ids, pair.rejected_ids)
    return [((*pair.prompt_ids, *answer), len(answer)) for answer in answers]


@pytest.mark.parametrize("template", ["own", "chatml"])
def test_the_ids_of_chats_are_those_of_training(small_base: Path, tmp_path: Path, template: str) -> None:
    for base in (small_base, TINY_BASE):
        tokenizer = load_tokenizer(base)
        if template == "chatml":
            tokenizer.chat_template = CHATML
        got = [encode_answer(tokenizer, PROMPT, answer) for answer in ANSWERS]
        assert [(each.ids, each.num_answer) for each in got] == trained_ids(tmp_path, tokenizer, is_chat=True)


def test_the_ids_of_texts_are_those_of_training(small_base: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    tokenizer.chat_template = None
    got = [encode_answer(tokenizer, PROMPT, answer) for answer in ANSWERS]
    assert [(each.ids, each.num_answer) for each in got] == trained_ids(tmp_path, tokenizer, is_chat=False)
    assert got[0].ids[-1] == tokenizer.eos_token_id


def test_the_first_token_of_a_text_is_never_part_of_the_answer(small_base: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    tokenizer.chat_template = None
    ids = tokenizer("wash")["input_ids"]
    assert len(ids) == 1
    # "w" alone is another token than "wash", so the two texts have no token in common
    encoded = encode_answer(tokenizer, "w", "ash")
    assert encoded.ids == (ids[0], tokenizer.eos_token_id)
    assert encoded.num_answer == 1


def test_a_text_that_the_base_cannot_take_is_rejected(small_base: Path) -> None:
    tokenizer = load_tokenizer(small_base)
    num = len(encode_answer(tokenizer, PROMPT, ANSWERS[0]).ids)
    assert len(encode_answer(tokenizer, PROMPT, ANSWERS[0], max_tokens=num).ids) == num
    with pytest.raises(InputError, match=f"have {num} tokens, but the model takes at most {num - 1}"):
        encode_answer(tokenizer, PROMPT, ANSWERS[0], max_tokens=num - 1)
    with pytest.raises(InputError, match="the base has no token"):
        encode_answer(tokenizer, PROMPT, ANSWERS[0], num_embeddings=20)
