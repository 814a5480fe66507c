from __future__ import annotations

import pytest

from personalized_soups.scoring.text_checks import distinct_share, script_share


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("", 1.0),
        ("one two three", 1.0),
        ("one two three four five six", 1.0),
        # 8 words have 5 sequences: the second half repeats only "a b c d"
        ("a b c d A, B, C, D!", 4 / 5),
        ("no " * 20, 1 / 17),
    ],
)
def test_a_loop_has_few_distinct_sequences(text: str, share: float) -> None:
    assert distinct_share(text) == pytest.approx(share)


@pytest.mark.parametrize(
    ("prompt", "answer", "share"),
    [
        ("How?", "Dust it.", 1.0),
        ("How?", "Пыль", 0.0),
        ("How?", "ab Пы", 0.5),
        ("Как?", "Пыль it", 4 / 6),
        ("123?", "Пыль", 1.0),
        ("How?", "123 !", 1.0),
        ("どう掃除しますか", "ランプを拭く", 1.0),
        ("How?", "Café \u00b5 ª", 1.0),  # signs that are letters of no script do not count
    ],
)
def test_letters_of_another_script_than_the_prompt(prompt: str, answer: str, share: float) -> None:
    assert script_share(prompt, answer) == pytest.approx(share)
