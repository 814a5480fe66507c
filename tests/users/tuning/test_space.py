"""What the numbers of a search mean: the side rule holds, and every allowed profile has its vector."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from personalized_soups import SideRule
from personalized_soups.users.tuning.space import SearchSpace

EXPERTS = ["concise", "friendly", "informative", "unfriendly", "witty"]
TWO = SideRule(
    {"friendly": "style", "unfriendly": "style", "concise": "length", "informative": "length"},
    {"friendly": "friendly"},
)
THREE = SideRule(dict.fromkeys(("friendly", "unfriendly", "witty"), "style"))
NUMBERS = st.floats(-1.5, 1.5)


def test_one_signed_number_stands_for_two_opposed_experts() -> None:
    space = SearchSpace(EXPERTS, TWO)
    assert space.num_coordinates == 3
    assert [axis.experts for axis in space.axes] == [("concise", "informative"), ("friendly", "unfriendly"), ("witty",)]
    assert space.weights(np.array([-0.8, 0.6, -0.2])) == {"concise": 0.8, "unfriendly": 0.6, "witty": -0.2}
    assert space.weights(np.array([0.8, -0.6, 0.0])) == {"informative": 0.8, "friendly": 0.6}
    assert space.weights(np.zeros(3)) == {}


def test_each_expert_has_a_number_if_opposed_sides_are_allowed() -> None:
    space = SearchSpace(EXPERTS, None)
    assert space.num_coordinates == 5
    numbers = [0.1, -0.2, 0.3, -0.4, 0.5]
    assert space.weights(np.array(numbers)) == dict(zip(EXPERTS, numbers, strict=True))


def test_weights_are_rounded_to_what_is_written() -> None:
    space = SearchSpace(["witty"], None)
    assert space.weights(np.array([0.123456])) == {"witty": 0.1235}
    assert space.weights(np.array([-0.00004])) == {}


@given(st.lists(NUMBERS, min_size=3, max_size=3))
def test_of_three_sides_the_largest_has_a_weight_that_is_continuous(numbers: list[float]) -> None:
    space = SearchSpace(["friendly", "unfriendly", "witty"], THREE)
    x = np.array(numbers)
    weights = space.weights(x)
    assert len(weights) <= 1
    sizes = np.sort(np.abs(x))
    # the weight is what the largest number has above the second largest, to the rounding of 4 decimals
    assert sum(abs(weight) for weight in weights.values() if isinstance(weight, float)) == pytest.approx(
        sizes[-1] - sizes[-2], abs=1e-4
    )
    for name, weight in weights.items():
        assert isinstance(weight, float)
        assert np.sign(weight) == np.sign(x[["friendly", "unfriendly", "witty"].index(name)])


def test_two_experts_of_one_side_may_both_have_weights() -> None:
    rule = SideRule(dict.fromkeys(("a", "b", "c"), "style"), {"a": "friendly", "b": "friendly", "c": "unfriendly"})
    space = SearchSpace(["a", "b", "c"], rule)
    assert space.num_coordinates == 3
    # the friendly side has the largest number, 0.8; the other side has half of it, so weights are halved
    assert space.weights(np.array([0.8, -0.6, 0.4])) == {"a": 0.4, "b": -0.3}
    assert space.weights(np.array([0.4, -0.6, 0.8])) == {"c": pytest.approx(0.2)}


@given(
    st.dictionaries(st.sampled_from(["concise", "friendly", "witty"]), st.floats(0.01, 1.5)),
    st.booleans(),
    st.booleans(),
)
def test_every_allowed_profile_has_its_vector(weights: dict[str, float], other: bool, three: bool) -> None:
    rounded = {name: round(weight, 4) for name, weight in weights.items()}
    if other and "friendly" in rounded:
        rounded["unfriendly"] = rounded.pop("friendly")
    if three:
        rounded.pop("witty", None)
    space = SearchSpace(EXPERTS, THREE if three else TWO)
    assert space.weights(space.vector(rounded)) == rounded


def test_layer_groups_have_numbers_of_their_own() -> None:
    groups = [["*.0.*"], ["*.1.*", "*"]]
    space = SearchSpace(["friendly", "unfriendly", "witty"], TWO, groups)
    assert space.num_coordinates == 4
    assert space.weights(np.array([-0.5, 0.2, 0.0, 0.7])) == {
        # the sum of the first two numbers is negative, so friendly has the weights in both groups
        "friendly": {"*.0.*": 0.5, "*.1.*": -0.2, "*": -0.2},
        "witty": {"*.0.*": 0.0, "*.1.*": 0.7, "*": 0.7},
    }
    assert space.vector({"unfriendly": 0.5, "witty": 0.3}).tolist() == [0.5, 0.5, 0.3, 0.3]


@given(st.lists(NUMBERS, min_size=10, max_size=10), st.sampled_from([TWO, THREE]))
def test_the_side_rule_holds_for_every_vector(numbers: list[float], rule: SideRule) -> None:
    space = SearchSpace(EXPERTS, rule, [["*.0.*"], ["*"]])
    weights = space.weights(np.array(numbers[: space.num_coordinates]))
    assert rule.opposed(list(weights)) is None
