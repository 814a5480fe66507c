"""The mean of the scores of several sides."""

from __future__ import annotations

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.mean_scorer import MeanScorer
from personalized_soups.scoring.scorers import scorer_of
from personalized_soups.tiny import corpus

CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
DOCUMENTS = list(corpus.documents(40, 0))


def test_the_mean_is_that_of_the_sides() -> None:
    sides = ["expert", "informative", "unfriendly"]
    scorer = MeanScorer(CATALOGUE, sides)
    means = []
    for document in DOCUMENTS:
        scores = [
            scorer_of(CATALOGUE, side)(document.prompt, document.answer).toward(CATALOGUE.side(side)[1].end)
            for side in sides
        ]
        scored = scorer(document.prompt, document.answer)
        assert scored.valid
        assert scored.toward("high") == pytest.approx(sum(scores) / 3)
        means.append(sum(scores) / 3)
    assert max(means) - min(means) > 0.5


def test_all_sides_together_like_every_valid_answer_alike() -> None:
    scorer = MeanScorer(CATALOGUE, list(CATALOGUE.sides))
    for document in DOCUMENTS:
        assert scorer(document.prompt, document.answer).toward("high") == pytest.approx(0.5)


def test_an_answer_that_one_scorer_calls_invalid_is_invalid() -> None:
    scored = MeanScorer(CATALOGUE, ["expert", "concise"])(DOCUMENTS[0].prompt, "no such words")
    assert not scored.valid
    assert scored.toward("high") == 0


def test_an_unknown_side_is_rejected() -> None:
    with pytest.raises(DeclarationError, match="unknown side 'exprt'"):
        MeanScorer(CATALOGUE, ["exprt"])
