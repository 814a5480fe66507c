"""The second measures: what they count, and what they do not depend on."""

from __future__ import annotations

import pytest

from personalized_soups.scoring.judges import content_words, long_words

PROMPT = "How do I clean a lamp?"


def test_long_words_are_a_share_and_sentences_do_not_matter() -> None:
    one = "Contaminated surfaces need a wash now and then so do it"  # 2 of 11 words have 8 letters or more
    assert long_words(PROMPT, one).value == pytest.approx((2 / 11 - 0.06) / 0.16)
    split = one.replace(" need", ". Need").replace(" so", ". So")
    assert long_words(PROMPT, split) == long_words(PROMPT, one)
    assert long_words(PROMPT, f"{one} {one}") == long_words(PROMPT, one)
    assert long_words(PROMPT, "Dust it now").value == 0.0
    assert long_words(PROMPT, "Carefully disassemble").value == 1.0
    assert long_words(PROMPT, "1234567890 and 12").value == 0.0  # numbers are no words


def test_content_words_are_counted_once_and_without_grammar_and_prompt() -> None:
    words = [f"{chr(97 + at % 26)}{chr(97 + at // 26)}x" for at in range(40)]
    for count in (0, 6, 20, 34, 40):
        answer = " ".join(["the", *words[:count]])
        assert content_words(PROMPT, answer).value == pytest.approx(min(1.0, max(0.0, (count - 6) / 28)))
        assert content_words(PROMPT, f"{answer}. {answer}!") == content_words(PROMPT, answer)
        assert content_words(PROMPT, f"Clean the lamp: {answer}") == content_words(PROMPT, answer)


@pytest.mark.parametrize("answer", ["", "...", "123"])
def test_an_answer_without_words_is_not_valid(answer: str) -> None:
    assert not long_words(PROMPT, answer).valid
    assert not content_words(PROMPT, answer).valid
    assert long_words(PROMPT, "yes").valid
    assert content_words(PROMPT, "yes").valid
