"""What a question looks like in terminals of several widths, and the line after an answer."""

from __future__ import annotations

import math

import pytest

from personalized_soups.cli.serve.interview.screen import guess_text, question_text, so_far_text
from personalized_soups.declare.evidence import Question
from personalized_soups.users.answers.preferences import Certainty, Preference
from personalized_soups.users.answers.session import ShownQuestion

QUESTION = Question(
    id="q1",
    prompt="How do I clean a lamp?",
    a="Dust the lamp with a dry cloth. Then wipe the shade with warm water and a little soap, and let it dry.",
    b="Happy to help! Dust it.",
)

WIDE = f"""\
question 3 of 10

How do I clean a lamp?

A {"-" * 56}    B {"-" * 56}
Dust the lamp with a dry cloth. Then wipe the shade with      Happy to help! Dust it.
warm water and a little soap, and let it dry."""

NARROW = f"""\
question 3 of 10

How do I clean a lamp?

A {"-" * 58}
Happy to help! Dust it.

B {"-" * 58}
Dust the lamp with a dry cloth. Then wipe the shade with
warm water and a little soap, and let it dry."""


def test_answers_are_side_by_side_in_a_wide_terminal() -> None:
    assert question_text(ShownQuestion(QUESTION, swapped=False), number=3, total="10", width=120) == WIDE


def test_answers_are_one_above_the_other_in_a_narrow_terminal_and_b_is_first_if_swapped() -> None:
    assert question_text(ShownQuestion(QUESTION, swapped=True), number=3, total="10", width=60) == NARROW


@pytest.mark.parametrize("width", [20, 60, 80, 99, 100, 120, 400])
def test_no_line_is_wider_than_the_terminal_and_no_word_is_lost(width: int) -> None:
    text = question_text(ShownQuestion(QUESTION, swapped=False), number=3, total="10", width=width)
    assert max(map(len, text.split("\n"))) <= width
    for words in (QUESTION.prompt, QUESTION.a, QUESTION.b):
        assert set(words.split()) <= set(text.split())


def test_control_characters_of_an_answer_do_not_reach_the_terminal() -> None:
    question = Question(id="q1", prompt="a\x07b", a="red \x1b[31m [bold]x[/bold]\r", b="tab\there\n\nlast \x9b2J")
    text = question_text(ShownQuestion(question, swapped=False), number=1, total="1", width=80)
    assert not {letter for letter in text if (ord(letter) < 32 and letter != "\n") or 127 <= ord(letter) < 160}
    assert "red \N{REPLACEMENT CHARACTER}[31m [bold]x[/bold]" in text
    assert "\n\nlast" in text


def _preference(dimension: str, preferred: str, certainty: Certainty) -> Preference:
    return Preference(dimension, preferred, None, 1.0, (0.0, 2.0), 0.9, 0.9, certainty)


def test_the_line_after_an_answer_names_what_is_clear_and_what_is_open() -> None:
    preferences = [
        _preference("style", "friendly", "clear"),
        _preference("expertise", "expert", "open"),
        _preference("informativeness", "concise", "likely"),
    ]
    assert so_far_text(preferences, 0.83) == (
        "so far  clear: friendly; likely: concise; open: expertise  (I would guess 8 of 10 of your choices)"
    )
    assert so_far_text(preferences[:1], math.nan) == "so far  clear: friendly"


@pytest.mark.parametrize(
    ("agreement", "words"), [(0.5, "5 of 10"), (0.86, "9 of 10"), (0.94, "9 of 10"), (1.0, "more than 9 of 10")]
)
def test_guesses_are_counted_in_tens_and_never_promise_all(agreement: float, words: str) -> None:
    assert guess_text(agreement) == f"I would guess {words} of your choices"
