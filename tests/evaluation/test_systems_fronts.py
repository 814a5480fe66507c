"""Fronts and hypervolumes of mixtures, against values worked out by hand."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.evaluation.scores import Graded
from personalized_soups.evaluation.systems_fronts import Mixture, fronts_of, reach_of

CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
BOTH = CATALOGUE.replaced(dimensions={name: CATALOGUE.dimensions[name] for name in ("expertise", "style")})
ONE = CATALOGUE.replaced(dimensions={"expertise": CATALOGUE.dimensions["expertise"]})


def mixture(shares: Mapping[str, float], *expert: float, friendly: float = 0.5, valid: bool = True) -> Mixture:
    """Return a mixture whose answers have these scores towards `expert`."""
    graded = []
    for number, score in enumerate(expert):
        toward = {"expert": score, "elementary": 1 - score, "friendly": friendly, "unfriendly": 1 - friendly}
        graded.append(Graded(f"prompt {number}", "answer", valid, toward if valid else dict.fromkeys(toward, 0.0)))
    return Mixture(shares, graded)


def test_a_front_has_the_mean_scores_of_each_share_over_the_other_dimensions() -> None:
    mixtures = [
        mixture({"elementary": 1.0, "friendly": 1.0}, 0.0, 0.2),
        mixture({"elementary": 1.0, "unfriendly": 1.0}, 0.2, 0.4),
        mixture({"elementary": 0.5, "expert": 0.5, "friendly": 1.0}, 0.5, 0.5),
        mixture({"expert": 1.0, "friendly": 1.0}, 1.0, 0.8),
        mixture({"expert": 1.0, "unfriendly": 1.0}, 0.8, 0.6),
        mixture({"expert": 1.0, "friendly": 0.5, "unfriendly": 0.5}, 0.0, 0.0),  # between the sides of style only
    ]
    (front, style) = fronts_of("soups", mixtures, BOTH)
    assert front["sides"] == ["elementary", "expert"]
    assert front["is_opposed"]
    # between the ends, there is a mixture with `friendly` only, so the ends are those with `friendly`
    assert [pytest.approx(point) for point in front["points"]] == [[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]]
    assert front["hypervolume"] == pytest.approx(0.1 * 0.9 + 0.4 * 0.5 + 0.4 * 0.1)
    assert front["interval"][0] <= front["hypervolume"] <= front["interval"][1]
    assert style["sides"] == ["friendly", "unfriendly"]
    assert len(style["points"]) == 3
    (ends, _) = fronts_of("policies", [each for each in mixtures if len(each.shares) == 2], BOTH)
    assert [pytest.approx(point) for point in ends["points"]] == [[0.8, 0.2], [0.2, 0.8]]  # over both sides of style


def test_a_sweep_has_more_than_its_ends_and_invalid_answers_count_nothing() -> None:
    ends = [mixture({"elementary": 1.0}, 0.1), mixture({"expert": 1.0}, 0.9)]
    middle = {"elementary": 0.5, "expert": 0.5}

    def volume(*mixtures: Mixture) -> float:
        (front,) = fronts_of("system", mixtures, ONE)
        return front["hypervolume"]

    assert volume(*ends) == pytest.approx(0.9 * 0.1 + 0.8 * 0.1)
    assert volume(*ends, mixture(middle, 0.5)) == pytest.approx(0.1 * 0.9 + 0.4 * 0.5 + 0.4 * 0.1)
    assert volume(*ends, mixture(middle, 0.5, valid=False)) == pytest.approx(volume(*ends))


def test_the_reach_is_the_volume_over_the_wanted_sides_of_each_combination() -> None:
    mixtures = [
        mixture({"expert": 1.0, "friendly": 1.0}, 0.8, friendly=0.5),
        mixture({"elementary": 1.0, "friendly": 1.0}, 0.4, friendly=1.0),
    ]
    combinations = [("expert", "friendly"), ("elementary", "unfriendly")]
    reach = reach_of("soups", [*mixtures, mixtures[0]], combinations)
    assert reach["num_mixtures"] == 2
    first = 0.8 * 0.5 + 0.4 * 0.5  # (0.8, 0.5) and (0.4, 1.0)
    second = 0.2 * 0.5  # (0.2, 0.5) and (0.6, 0.0)
    assert reach["hypervolume"] == pytest.approx((first + second) / 2)


def test_seeds_are_averaged_before_prompts_are_drawn() -> None:
    """Two seeds with the same answers are no more evidence than one."""
    ends = [({"elementary": 1.0}, [0.0, 0.1, 0.4, 0.2]), ({"expert": 1.0}, [0.9, 0.6, 1.0, 0.5])]
    (once,) = fronts_of("system", [mixture(shares, *scores) for shares, scores in ends], ONE)
    twice = [mixture(shares, *scores, *scores) for shares, scores in ends]
    (both,) = fronts_of("system", twice, ONE, num_seeds=2)
    assert both == once


def test_only_sides_of_one_scorer_are_opposed() -> None:
    paper = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
    style = paper.replaced(dimensions={"style": paper.dimensions["style"]})
    sides = list(style.sides)
    mixtures = [Mixture({side: 1.0}, [Graded("p", "a", True, dict.fromkeys(sides, 0.5))]) for side in sides]
    opposed = [front["sides"] for front in fronts_of("system", mixtures, style) if front["is_opposed"]]
    assert opposed == [["friendly", "unfriendly"]]
    assert len(sides) == 4
