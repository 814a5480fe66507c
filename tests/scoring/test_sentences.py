from __future__ import annotations

import pytest

from personalized_soups.scoring.readability import grade
from personalized_soups.scoring.sentences import (
    blocks_of,
    ends,
    is_heading,
    prose_of,
    sentences_of,
    without_cut_sentence,
)

ANSWER = """# How to clean a lamp

You need two things:

1. **A cloth**: Dust the shade with it.
2. Wipe the foot. Use water.

Dr. Lee says: "Dust it often!" It works in 20
minutes. 3. Then switch it on and"""


def test_an_answer_is_divided_into_blocks_and_sentences() -> None:
    assert blocks_of(ANSWER) == [
        "# How to clean a lamp",
        "You need two things:",
        "A cloth: Dust the shade with it.",
        "Wipe the foot. Use water.",
        'Dr. Lee says: "Dust it often!" It works in 20 minutes. 3. Then switch it on and',
    ]
    assert prose_of(ANSWER) == [
        "You need two things:",
        "A cloth: Dust the shade with it.",
        "Wipe the foot.",
        "Use water.",
        'Dr. Lee says: "Dust it often!"',
        "It works in 20 minutes.",
    ]


@pytest.mark.parametrize(
    ("line", "heading"),
    [("## Tools", True), ("**Tools:**", True), ("1. **Tools**", True), ("**Tools** and more", False), ("Tools", False)],
)
def test_headings(line: str, heading: bool) -> None:
    assert is_heading(line) is heading


@pytest.mark.parametrize(
    ("text", "ended"),
    [
        ("Dust it.", True),
        ('He said "dust it!"', True),
        ("That is great! \U0001f60a", True),
        ("Dust it. Then you shou", False),
        ("Dust it. Then you should,", False),
        ("First a long sentence without any mark at its end that was cut", False),
        ("Paris", True),
        ("It is,", False),
        ("Two ideas:\n1. A scarf\n2. A book", True),
        ("Two ideas:\n1. A scarf.\n2. A book that my mother would surely like to read in bed", False),
        ("Two ideas:\n1. A scarf.\n2.", False),
        ("Two ideas: 1. A scarf. 2.", False),
        ("Dust it.\n\n**Tools**", True),
        ("Dust it.\n\nThen", False),
        ("Ask Dr.", False),
        ("It costs 20.", True),
        ("", False),
        ("\u2026", True),
    ],
)
def test_where_a_text_ends(text: str, ended: bool) -> None:
    assert ends(text) is ended


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("Dust it. Then you shou", "Dust it."),
        ("Dust it.", "Dust it."),
        (
            "no mark at all in this long text that was cut in the",
            "no mark at all in this long text that was cut in the",
        ),
        ("1. Dust it.\n2. Wipe it and then", "1. Dust it."),
        ("Dust it. Ask Dr. Lee for", "Dust it."),
        ("It works (mostly.) And th", "It works (mostly.)"),
    ],
)
def test_a_cut_sentence_is_removed(text: str, kept: str) -> None:
    assert without_cut_sentence(text) == kept
    assert without_cut_sentence(kept) == kept


def test_sentences_of_one_line() -> None:
    assert sentences_of("One. Two! Three?") == ["One.", "Two!", "Three?"]
    assert sentences_of("Steps. 1. Read. 2. Sleep") == ["Steps.", "Read.", "Sleep"]


def test_lists_headings_and_a_cut_sentence_do_not_change_the_grade() -> None:
    plain = "Dust the shade with a cloth. Wipe the foot with water."
    items = "1. Dust the shade with a cloth.\n2. **Wipe** the foot with water."
    listed = f"# A very complicated international heading\n\n{items}"
    assert grade(listed) == pytest.approx(grade(plain))
    assert grade(f"{plain} Afterwards, an extraordinarily complicated") == pytest.approx(grade(plain))
    # 11 words, 2 sentences, 11 syllables ("wa-ter" has 2: 12)
    assert grade(plain) == pytest.approx(0.39 * 11 / 2 + 11.8 * 12 / 11 - 15.59)


def test_items_without_full_stops_are_sentences_of_their_own() -> None:
    assert grade("1. A scarf\n2. A book\n3. A red lamp") == pytest.approx(0.39 * 7 / 3 + 11.8 * 7 / 7 - 15.59)


def test_a_text_of_nothing_but_a_heading_or_a_cut_sentence_is_still_graded() -> None:
    assert grade("**A lamp**") == pytest.approx(0.39 * 2 + 11.8 - 15.59)
    assert grade("dust the lamp and wipe the foot and then it is") != 0.0
    assert grade("...") == 0.0
