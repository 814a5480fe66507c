"""Reward models as judges: rewards known up to a constant become scores towards sides."""

from __future__ import annotations

from collections.abc import Sequence
from math import exp
from typing import Any, cast

import numpy as np
import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.evaluation.grading import Grader
from personalized_soups.evaluation.reward_judge import RewardJudge
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.tiny.corpus import documents

CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)


class Lengths:
    """A reward for each side: the number of words, more or less of it, and a constant."""

    names = tuple(CATALOGUE.sides)

    def features(self, items: Sequence[TextItem]) -> Any:
        words = np.array([len(item.answer.split()) for item in items])
        signs = [1.0 if name in ("expert", "informative") else -1.0 for name in self.names]
        return np.stack([sign * words + 100 * at for at, sign in enumerate(signs)], axis=1)


JUDGE = RewardJudge(CATALOGUE, cast("Any", Lengths()))


def test_the_reference_is_in_the_middle_and_scores_of_two_sides_add_up_to_one() -> None:
    judge = JUDGE.centred_on(["q", "q"], ["one two", "one two three four"])  # 3 words on average
    three, five = judge.toward(["q", "q"], ["a b c", "a b c d e"])
    assert three == pytest.approx(dict.fromkeys(CATALOGUE.sides, 0.5))
    # the rewards of both sides differ by 2 words from the reference, in opposite directions
    assert five["informative"] == pytest.approx(1 / (1 + exp(-4)))
    assert five["concise"] == pytest.approx(1 - five["informative"])
    assert five["friendly"] == pytest.approx(0.5)  # both sides fall alike


def test_the_reference_is_in_the_middle_of_three_sides_too() -> None:
    dimension = CATALOGUE.dimensions["expertise"]
    third = dimension.sides["expert"].replaced(label=None)
    catalogue = CATALOGUE.replaced(
        dimensions={"expertise": dimension.replaced(sides={**dimension.sides, "third": third})}
    )

    class Three(Lengths):
        names = tuple(catalogue.sides)

    judge = RewardJudge(catalogue, cast("Any", Three())).centred_on(["q"], ["a b c"])
    middle, longer = judge.toward(["q", "q"], ["a b c", "a b c d"])
    assert middle == pytest.approx(dict.fromkeys(catalogue.sides, 0.5))
    # against the mean of `elementary` and `third`, whose rewards fall by 1 with each word
    assert longer["expert"] == pytest.approx(exp(1) / (exp(1) + exp(-1)))


def test_a_dimension_with_one_side_is_compared_with_the_reference() -> None:
    dimension = CATALOGUE.dimensions["expertise"]
    alone = dimension.replaced(sides={"expert": dimension.sides["expert"]})
    catalogue = CATALOGUE.replaced(dimensions={"expertise": alone})
    judge = RewardJudge(catalogue, cast("Any", Lengths())).centred_on(["q"], ["a b c"])
    (four,) = judge.toward(["q"], ["a b c d"])
    assert four == pytest.approx({"expert": 1 / (1 + exp(-1))})


def test_a_grader_asks_the_judge_and_an_invalid_answer_has_no_score() -> None:
    document = next(iter(documents(1, 0)))
    judge = JUDGE.centred_on([document.prompt], [document.answer])
    good, bad = Grader(CATALOGUE, judge).graded([document.prompt] * 2, [document.answer, "no such words"])
    assert good.judged == pytest.approx(dict.fromkeys(CATALOGUE.sides, 0.5))
    assert set(bad.judged.values()) == {0.0}
