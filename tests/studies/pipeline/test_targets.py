"""What labels, pairs and trainings are made for, and how the models of each kind are mixed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.run_recipe import RunRecipe
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import DeclarationError
from personalized_soups.studies.pipeline.mixing import Mixing, shares_between
from personalized_soups.studies.pipeline.targets import beta_of, targets_of
from personalized_soups.systems.bone_soups.mixing import mixing_matrix

CATALOGUE = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue)
HIGH = {"expertise": "expert", "informativeness": "informative", "style": "friendly"}


def recipe(**labels: Any) -> RunRecipe:
    steps = {
        "pool": {"kind": "rollouts", "prompts": "p.txt"},
        "labels": {"kind": "label", "rollouts": "pool", **labels},
        "pairs": {"kind": "pairs", "labels": "labels"},
        "train": {"kind": "train", "pairs": "pairs", "recipe": "r.yaml"},
    }
    return RunRecipe.model_validate_json(json.dumps({"base": "tiny", "steps": steps}))


def test_a_backbone_is_labelled_by_the_weights_of_its_row() -> None:
    declared = recipe(targets="dimensions", beta=0.7)
    targets = targets_of("train", declared, CATALOGUE)
    assert [target.name for target in targets] == list(HIGH)
    matrix = mixing_matrix(3, 0.7)
    for row, target in zip(matrix, targets, strict=True):
        assert target.kind == "dimension"
        assert target.weights == pytest.approx(dict(zip(HIGH.values(), row, strict=True)))
    assert beta_of("train", declared) == 0.7
    plain = targets_of("train", recipe(targets="dimensions"), CATALOGUE)
    assert [dict(target.weights) for target in plain] == [{side: 1.0} for side in HIGH.values()]  # Rewarded Soups


def test_a_beta_with_which_all_backbones_would_be_equal_is_rejected() -> None:
    with pytest.raises(DeclarationError, match=r"with 3 dimensions it must be above 1/3"):
        targets_of("train", recipe(targets="dimensions", beta=0.3), CATALOGUE)


def test_a_dimension_without_two_ends_has_no_backbone(tmp_path: Path) -> None:
    text = shipped_recipe("dimensions/tiny.yaml").read_text().replace("end: low", "end: high", 1)
    (tmp_path / "dimensions.yaml").write_text(text)
    with pytest.raises(DeclarationError, match=r"'expertise' has 0 low and 2 high sides"):
        targets_of("train", recipe(targets="dimensions"), load(tmp_path / "dimensions.yaml", Catalogue))


@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5])
def test_backbones_add_up_to_the_preference_of_any_user(beta: float) -> None:
    rng = np.random.default_rng(0)
    for shares in rng.random((20, 3)):
        user = {side: share for name, share in zip(HIGH, shares, strict=True) for side, share in both(name, share)}
        profile = Mixing(CATALOGUE, beta).profile(user, "linear", 2.0)
        assert profile is not None
        weights = profile.weights
        mixed = mixing_matrix(3, beta).T @ np.array([weights[name] for name in HIGH])
        assert mixed == pytest.approx(2 * (2 * shares - 1))


def both(dimension: str, share: float) -> list[tuple[str, float]]:
    low = next(side for side in CATALOGUE.dimensions[dimension].sides if side != HIGH[dimension])
    return [(low, 1 - share), (HIGH[dimension], share)]


def test_experts_of_sides_have_their_shares_and_absent_sides_no_weight() -> None:
    profile = Mixing(CATALOGUE, None).profile({"expert": 0.25, "elementary": 0.75, "concise": 1.0}, "linear", 0.8)
    assert profile is not None
    assert profile.weights == pytest.approx({"expert": 0.2, "elementary": 0.6, "concise": 0.8})


def test_a_sweep_has_each_mixture_of_each_edge_once() -> None:
    combinations = recipe().combinations(CATALOGUE)
    mixtures = shares_between(CATALOGUE, combinations, 5)
    assert len(mixtures) == 8 + 12 * 3  # the corners of a cube, and 3 mixtures within each edge
    assert len({frozenset(each.items()) for each in mixtures}) == len(mixtures)
    for shares in mixtures:
        for dimension in CATALOGUE.dimensions.values():
            assert sum(shares.get(side, 0.0) for side in dimension.sides) == pytest.approx(1)
    for sides in combinations:  # three edges meet at each combination, whichever its sides are
        assert len(shares_between(CATALOGUE, [sides], 3)) == 1 + 3 * 2


def test_backbones_in_the_middle_of_one_dimension_are_the_base() -> None:
    one = CATALOGUE.replaced(dimensions={"style": CATALOGUE.dimensions["style"]})
    assert Mixing(one, 1.0).profile({"friendly": 0.5, "unfriendly": 0.5}, "linear", 0.8) is None


def test_some_combinations_can_be_drawn() -> None:
    every = recipe().combinations(CATALOGUE)
    drawn = recipe().replaced(num_combinations=5).combinations(CATALOGUE)
    assert len(set(drawn)) == 5
    assert set(drawn) <= set(every)
    assert drawn == [each for each in every if each in drawn]
    assert recipe().replaced(num_combinations=5, seed=1).combinations(CATALOGUE) != drawn
    assert recipe().replaced(num_combinations=9).combinations(CATALOGUE) == every
