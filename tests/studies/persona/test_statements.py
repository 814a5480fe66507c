"""Statements are read strictly, and no part of a split holds a paraphrase of a statement of another part."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.studies.persona.statements import (
    SAME_WORDS,
    Statement,
    paraphrases,
    read_statements,
    split_statements,
)

VERBS = ("paint", "read", "climb", "sing", "cook", "write", "swim", "dance", "build", "sail")
THINGS = ("bridges", "novels", "mountains", "songs", "meals", "letters", "rivers", "waltzes", "boats", "seas")
PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Perth", "Delhi")


def statements() -> list[Statement]:
    """600 statements. Those that differ in one of their three words are paraphrases (2 of 4 words in common)."""
    lines = [
        Statement(f"{verb} {thing} {place}", (one + two + three) % 2 == 0)
        for (one, verb), (two, thing), (three, place) in product(*map(enumerate, (VERBS, THINGS, PLACES)))
    ]
    own = ["".join("abcdefghij"[int(digit)] for digit in f"{number:03}") for number in range(200)]
    return lines + [Statement(f"alone{word} single{word}", at % 2 == 0) for at, word in enumerate(own)]


def overlap(first: str, second: str) -> float:
    one, two = set(first.lower().split()), set(second.lower().split())
    return len(one & two) / len(one | two)


def test_paraphrases_are_texts_with_half_of_their_words_in_common() -> None:
    texts = [statement.text for statement in statements()[::7]]
    same = paraphrases(texts)
    for first, second in product(range(len(texts)), repeat=2):
        expected = first != second and overlap(texts[first], texts[second]) >= SAME_WORDS
        assert same[first, second] == expected


def test_common_words_and_capitals_make_no_difference() -> None:
    same = paraphrases(["I like PAINTING", "painting is what people would do", "I like people"])
    assert np.flatnonzero(same.any(1)).tolist() == [0, 1]


def text_pairs(first: Sequence[Statement], second: Sequence[Statement]) -> list[tuple[str, str]]:
    return [(one.text, two.text) for one, two in product(first, second)]


@pytest.mark.parametrize("seed", [0, 1])
def test_a_split_is_balanced_and_has_no_paraphrases_across_its_parts(seed: int) -> None:
    split = split_statements(statements(), num_train=60, num_validation=10, num_test=10, seed=seed)
    for part, size in ((split.train, 60), (split.validation, 10), (split.test, 10)):
        assert len(set(part)) == size
        assert sum(statement.agrees for statement in part) == size // 2
    for one, two in ((split.train, split.validation), (split.train, split.test), (split.validation, split.test)):
        assert max(overlap(first, second) for first, second in text_pairs(one, two)) < SAME_WORDS


def test_seeds_give_different_splits_and_one_seed_gives_the_same() -> None:
    first, again, other = (
        split_statements(statements(), num_train=20, num_validation=10, num_test=10, seed=seed) for seed in (0, 0, 1)
    )
    assert first == again
    assert first != other


def test_too_few_statements_are_rejected() -> None:
    with pytest.raises(InputError, match="too few of the 800 statements are left for the training part"):
        split_statements(statements(), num_train=600, num_validation=10, num_test=10, seed=0)


def test_the_answers_of_a_trait_and_of_its_opposite_differ() -> None:
    for statement in (Statement("a", agrees=True), Statement("b", agrees=False)):
        assert {statement.answer(has_trait=True), statement.answer(has_trait=False)} == {"Yes", "No"}
    assert Statement("a", agrees=True).answer(has_trait=True) == "Yes"


def test_a_file_is_read_with_each_statement_once(tmp_path: Path) -> None:
    rows = [{"statement": "I sing.", "answer_matching_behavior": " Yes"}] * 2
    rows.append({"statement": "I never sing.", "answer_matching_behavior": " No"})
    (tmp_path / "music.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    assert read_statements(tmp_path, "music") == [
        Statement("I sing.", agrees=True),
        Statement("I never sing.", agrees=False),
    ]


def test_a_missing_file_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        read_statements(tmp_path, "music")
    assert "music.jsonl" in caught.value.where
    assert "github.com/anthropics/evals" in caught.value.mend


@pytest.mark.parametrize(
    "line",
    ["{", "[]", '{"statement": "I sing."}', '{"statement": "", "answer_matching_behavior": " Yes"}',
     '{"statement": "I sing.", "answer_matching_behavior": "Perhaps"}',
     '{"statement": 3, "answer_matching_behavior": "Yes"}'],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "music.jsonl").write_text('{"statement": "I sing.", "answer_matching_behavior": "Yes"}\n' + line)
    with pytest.raises(FileFormatError) as caught:
        read_statements(tmp_path, "music")
    assert caught.value.where.endswith("music.jsonl:2")
