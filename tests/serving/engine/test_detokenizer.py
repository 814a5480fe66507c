"""The detokenizer: the pieces together are the whole text, cut at the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from personalized_soups.serving.engine.detokenizer import Detokenizer, silent_tokens
from tests.serving.engine.worlds import VOCAB

# Characters of one to four bytes, and the replacement character, to which half a character decodes.
LETTERS = "ab €\u00e9\U0001f600\ufffd\n"
WORDS = st.text(LETTERS, max_size=12)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=4)


@pytest.fixture(scope="module")
def tokenizer(small_base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(small_base)


@pytest.fixture(scope="module")
def bytewise() -> Any:
    """Return a tokenizer like that of Llama 1: a space before each word, and a token for each byte of unknown words."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁b", "a", "b", "▁ab"]
    bpe = Tokenizer(
        models.BPE(
            {word: place for place, word in enumerate(words)}, [("▁", "a")], unk_token="<unk>", byte_fallback=True
        )
    )
    bpe.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    bpe.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _whole(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return a text up to the stop string that is complete first, letter by letter, and whether there is one."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if stop and text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


def _check(tokenizer: Any, tokens: Sequence[int], stops: Sequence[str]) -> None:
    """Add tokens one by one, and compare every piece with the whole text."""
    want, is_stopped = _cut(_whole(tokenizer, tokens), stops)
    detokenizer = Detokenizer(tokenizer, stops, silent_tokens(tokenizer))
    text_so_far = ""
    for token in tokens:
        text_so_far += detokenizer.add(token)
        assert want.startswith(text_so_far)  # no piece has half a character, or text of a stop string
        if detokenizer.is_stopped:
            break
    else:
        text_so_far += detokenizer.end()
    assert (text_so_far, detokenizer.is_stopped) == (want, is_stopped)


@settings(max_examples=400, deadline=None)
@given(tokens=st.lists(st.integers(0, VOCAB - 1), max_size=25), stops=STOPS)
def test_any_tokens_with_any_stops(tokenizer: Any, tokens: list[int], stops: list[str]) -> None:
    _check(tokenizer, [token % len(tokenizer) for token in tokens], stops)


@settings(max_examples=400, deadline=None)
@given(text=WORDS, stops=STOPS, noise=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 5)), max_size=4))
@example(text="a\U0001f600b", stops=["\U0001f600"], noise=[(2, 1)])
@example(text="aab", stops=["ab", "aa"], noise=[])
@example(text="a€\ufffdab", stops=["\ufffda", "a€\ufffdb"], noise=[])
def test_letters_of_many_bytes_with_special_tokens_between(
    tokenizer: Any, text: str, stops: list[str], noise: list[tuple[int, int]]
) -> None:
    tokens = list(tokenizer(text)["input_ids"])
    for place, special in noise:  # also between the bytes of one letter
        tokens.insert(place % (len(tokens) + 1), special)
    _check(tokenizer, tokens, stops)


@settings(max_examples=200, deadline=None)
@given(text=WORDS, stops=STOPS)
def test_letters_whose_bytes_are_tokens(bytewise: Any, text: str, stops: list[str]) -> None:
    tokens = [token for token in bytewise(text)["input_ids"] if token]
    _check(bytewise, tokens, stops)


@settings(max_examples=200, deadline=None)
@given(text=WORDS, stops=STOPS, cut=st.integers(1, 5))
@example(text="aabb", stops=["aabb", "ab"], cut=5)
def test_the_division_into_tokens_does_not_matter(tokenizer: Any, text: str, stops: list[str], cut: int) -> None:
    detokenizer = Detokenizer(tokenizer, stops)
    pieces = [text[start : start + cut] for start in range(0, len(text), cut)]
    text_so_far = ""
    for piece in pieces:
        text_so_far += detokenizer._until_stop(piece)
    text_so_far += detokenizer.end()
    assert (text_so_far, detokenizer.is_stopped) == _cut(text, stops)


def test_a_character_may_continue_after_special_tokens(tokenizer: Any) -> None:
    half, *rest = tokenizer("\U0001f600")["input_ids"]
    tokens = [*[half] * 20, half, *[1] * 20, *rest]
    detokenizer = Detokenizer(tokenizer)  # without the list of special tokens
    text_so_far = "".join([detokenizer.add(token) for token in tokens]) + detokenizer.end()
    assert text_so_far == _whole(tokenizer, tokens)
    assert text_so_far.endswith("\U0001f600")


def test_text_is_held_back_only_while_it_may_start_a_stop_string(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ["abc"])
    tokens = [int(tokenizer(letter)["input_ids"][0]) for letter in "xababdab"]
    assert [detokenizer.add(token) for token in tokens] == ["x", "", "", "ab", "", "abd", "", ""]
    assert detokenizer.end() == "ab"
    assert detokenizer.end() == ""


def test_empty_stop_strings_are_ignored(tokenizer: Any) -> None:
    detokenizer = Detokenizer(tokenizer, ["", ""])
    assert detokenizer.add(int(tokenizer("x")["input_ids"][0])) == "x"
    assert not detokenizer.is_stopped


class _Counting:
    """A tokenizer that counts the tokens that it decodes."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.count = 0

    def decode(self, tokens: list[int], **options: Any) -> str:
        self.count += len(tokens)
        return str(self.tokenizer.decode(tokens, **options))


@pytest.mark.parametrize("kind", ["special", "half letters", "whole letters", "bytes"])
def test_the_work_for_a_token_does_not_grow_with_the_answer(tokenizer: Any, bytewise: Any, kind: str) -> None:
    used = bytewise if kind == "bytes" else tokenizer
    half = int(tokenizer("\U0001f600")["input_ids"][0])
    token = {"special": 1, "half letters": half, "whole letters": int(tokenizer("a")["input_ids"][0]), "bytes": 3 + 255}
    counting: Any = _Counting(used)
    detokenizer = Detokenizer(counting, silent=silent_tokens(used))
    text_so_far = "".join([detokenizer.add(token[kind]) for _ in range(1000)])
    # little text is held back, and each new token decodes a bounded number of earlier ones
    assert len(_whole(used, [token[kind]] * 1000)) - len(text_so_far) <= 20
    assert counting.count < 100 * 1000
    assert text_so_far + detokenizer.end() == _whole(used, [token[kind]] * 1000)
