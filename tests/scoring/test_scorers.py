from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.readability import grade
from personalized_soups.scoring.scorers import (
    Scored,
    length_scorer,
    markers_scorer,
    python_scorer,
    readability_scorer,
    scorer_of,
)


def test_an_invalid_answer_suits_no_side() -> None:
    assert Scored(0.9, valid=True).toward("high") == 0.9
    assert Scored(0.9, valid=True).toward("low") == pytest.approx(0.1)
    assert Scored(0.9, valid=False).toward("high") == 0.0
    assert Scored(0.1, valid=False).toward("low") == 0.0


@pytest.mark.parametrize(
    ("answer", "value"),
    [
        ("Great, my friend! Do it yourself.", 2 / 3),
        ("GREAT.", 1.0),
        ("That is greatly overrated.", 0.5),  # part of a word is no marker
        ("Nothing here.", 0.5),
        ("do it\nyourself", 0.0),  # a phrase may break over a line
    ],
)
def test_markers_are_whole_words_in_any_case(answer: str, value: float) -> None:
    score = markers_scorer(high=["great", "my friend"], low=["do it yourself"])
    assert score("How?", answer).value == pytest.approx(value)


def test_the_longer_of_two_markers_that_begin_alike_is_counted() -> None:
    score = markers_scorer(high=["well done"], low=["well"])
    assert score("", "Well done.").value == 1.0


def test_a_marker_may_end_with_a_sign() -> None:
    assert markers_scorer(high=["wow!"], low=[])("", "Wow! Look.").value == 1.0


def test_a_marker_may_be_a_sign_that_touches_a_word() -> None:
    score = markers_scorer(high=["!"], low=["whatever", "..."])
    assert score("", "What fun!").value == 1.0
    assert score("", "Fun! Whatever... I know.").value == pytest.approx(1 / 3)


def test_no_low_markers_at_all() -> None:
    score = markers_scorer(high=["oh sure"], low=[])
    assert score("", "Oh sure, why not.").value == 1.0
    assert score("", "Yes.").value == 0.5


@pytest.mark.parametrize(("num_words", "value"), [(5, 0.0), (10, 0.0), (15, 0.5), (20, 1.0), (50, 1.0)])
def test_length_is_linear_between_its_ends(num_words: int, value: float) -> None:
    assert length_scorer(low=10, high=20)("", " ".join(["word"] * num_words)).value == pytest.approx(value)


def test_grade_follows_the_formula() -> None:
    # 6 words, 1 sentence, 6 syllables
    assert grade("The cat sat on the mat.") == pytest.approx(0.39 * 6 + 11.8 * 1 - 15.59)
    # in-ves-ti-ga-tion, ve-ri-fi-ca-tion, and "the", whose final e is not silent: 5 + 5 + 1 vowel groups
    assert grade("The investigation: verification!") == pytest.approx(0.39 * 3 + 11.8 * 11 / 3 - 15.59)
    # "made" has a silent e, "table" has not
    assert grade("Made table.") == pytest.approx(0.39 * 2 + 11.8 * 3 / 2 - 15.59)


def test_readability_puts_hard_words_above_easy_ones() -> None:
    score = readability_scorer(low=2, high=14)
    easy = score("", "The cat sat on the mat. It was fun. We all saw it.")
    hard = score("", "Sophisticated methodologies necessitate considerable interdisciplinary investigation.")
    assert easy.value == 0.0
    assert hard.value == 1.0


@pytest.mark.parametrize("answer", ["", "   \n", "...", "-- !"])
def test_an_answer_without_a_word_is_invalid(answer: str) -> None:
    for score in (
        markers_scorer(high=["a"], low=["b"]),
        length_scorer(low=1, high=2),
        readability_scorer(low=1, high=2),
    ):
        assert not score("How?", answer).valid


def test_a_side_is_scored_by_its_own_scorer_first() -> None:
    catalogue = Catalogue.model_validate_json(
        """{"dimensions": {"style": {"about": "tone", "scorer": {"kind": "length", "low": 0, "high": 4}, "sides": {
            "friendly": {"label": "P3A", "instruction": "Be kind."},
            "sarcastic": {"label": "P3D", "instruction": "Mock.",
                          "scorer": {"kind": "markers", "high": ["oh sure"], "low": []}}}}}}"""
    )
    assert scorer_of(catalogue, "friendly")("", "one two").value == 0.5
    assert scorer_of(catalogue, "sarcastic")("", "oh sure").value == 1.0
    with pytest.raises(DeclarationError) as caught:
        scorer_of(catalogue, "sarkastic")
    assert "sarcastic" in caught.value.mend


def test_a_python_scorer_is_any_function(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("somebody")
    module.good = lambda prompt, answer: Scored(0.25, valid=prompt == "p")  # type: ignore[attr-defined]
    module.bare = lambda prompt, answer: 0.5  # type: ignore[attr-defined]
    module.large = lambda prompt, answer: Scored(1.5, valid=True)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "somebody", module)
    assert python_scorer("somebody:good")("p", "a") == Scored(0.25, valid=True)
    for wrong in ("bare", "large"):
        with pytest.raises(DeclarationError, match=r"must return a Scored with a value in \[0, 1\]"):
            python_scorer(f"somebody:{wrong}")("p", "a")


@pytest.mark.parametrize("function", ["no_such_package:f", "json:no_such_function"])
def test_a_python_scorer_that_is_not_there_is_refused_at_once(function: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        python_scorer(function)
    assert function in caught.value.what


def test_every_side_of_the_shipped_catalogue_has_a_scorer() -> None:
    from personalized_soups.declare.loader import load

    catalogue = load(Path("recipes/dimensions/psoups.yaml"), Catalogue)
    assert len(catalogue.sides) == 8
    for side in catalogue.sides:
        scored = scorer_of(catalogue, side)("How do I boil an egg?", "Put the egg in boiling water for eight minutes.")
        assert scored.valid
        assert 0.0 <= scored.value <= 1.0
