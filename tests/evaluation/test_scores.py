from __future__ import annotations

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.evaluation import scores

PROMPT = "How do I clean an old kettle?"
GOOD = "Great question, my friend! Wash the old kettle with soap."
COLD = "Ugh, stop wasting my time. Treat the old kettle with an aqueous surfactant."
BROKEN = "Wash the old kettle with with soap"
SIDES = ("elementary", "expert", "concise", "informative", "friendly", "unfriendly")


@pytest.fixture(scope="module")
def graded() -> list[scores.Graded]:
    catalogue = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
    return scores.grade([PROMPT] * 3, [GOOD, COLD, BROKEN], catalogue, SIDES)


def test_each_answer_is_scored_towards_each_side(graded: list[scores.Graded]) -> None:
    good, cold, broken = graded
    assert (good.toward["friendly"], good.toward["elementary"], good.toward["concise"]) == (1.0, 1.0, 1.0)
    assert (cold.toward["friendly"], cold.toward["unfriendly"], cold.toward["expert"]) == (0.0, 1.0, 1.0)
    assert not broken.valid
    assert set(broken.toward.values()) == {0.0}


def test_shares_count_invalid_answers_as_nothing(graded: list[scores.Graded]) -> None:
    sides = ("elementary", "concise", "friendly")
    assert scores.valid_share(graded) == pytest.approx(2 / 3)
    assert scores.joint_share(graded, sides) == pytest.approx(1 / 3)
    assert scores.mean_worth(graded, sides) == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert scores.mean_toward(graded, "concise") == pytest.approx(2 / 3)
    assert scores.mean_toward(graded, "concise", of_valid=True) == 1.0


def test_distinct_bigrams_at_one_length() -> None:
    varied = ["a b c d e f g h i j k"]  # 10 bigrams, all distinct
    collapsed = ["a b c"] * 5  # 10 bigrams, 2 distinct
    assert scores.num_bigrams(varied) == scores.num_bigrams(collapsed) == 10
    assert scores.distinct_bigrams(varied, sample=10) == 1.0
    assert scores.distinct_bigrams(collapsed, sample=10) == 0.2
    with pytest.raises(ValueError, match="11"):
        scores.distinct_bigrams(varied, sample=11)


def test_every_prompt_needs_its_answer() -> None:
    catalogue = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
    with pytest.raises(ValueError, match="shorter"):
        scores.grade([PROMPT, PROMPT], [GOOD], catalogue, SIDES)
