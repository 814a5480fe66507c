from __future__ import annotations

import pytest

from personalized_soups.declare.expert_weights import ExpertWeights, checked_number
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import DeclarationError

STAMPS = {"a": 1, "b": 2}


def test_weights_of_a_profile_are_those_that_enter_a_merge() -> None:
    profile = Profile(weights={"b": 1.0, "a": 3.0}, normalize="sum")
    assert ExpertWeights.of(profile).weights == profile.resolved_weights() == {"a": 0.75, "b": 0.25}
    assert list(ExpertWeights.of(profile, ["a", "c", "b"]).weights) == ["a", "b"]


def test_a_schedule_is_asked_for_each_token_and_its_answer_checked() -> None:
    weights = ExpertWeights({"a": lambda step: 0.5 if step < 2 else float("nan"), "b": 1.0})
    assert weights.is_scheduled
    assert weights.at(1) == {"a": 0.5, "b": 1.0}
    with pytest.raises(DeclarationError, match="nan is not a finite number") as caught:
        weights.at(2)
    assert caught.value.where == "weights.a at step 2"


def test_scales_multiply_numbers_layers_and_schedules() -> None:
    weights = ExpertWeights({"a": 2.0, "b": {"*.mlp.*": 4.0}}, version=7)
    assert weights.scaled({"c": 3.0}) is weights
    scaled = weights.scaled({"a": 0.5, "b": 0.25})
    assert (scaled.weights, scaled.version) == ({"a": 1.0, "b": {"*.mlp.*": 1.0}}, 7)
    assert ExpertWeights({"a": lambda step: step + 1.0}).scaled({"a": 10.0}).at(1) == {"a": 20.0}


def test_a_cache_key_follows_weights_stamps_model_and_the_order_of_patterns() -> None:
    one = ExpertWeights({"a": 0.5, "b": {"x": 1.0, "y": 2.0}})
    key = one.cache_key(STAMPS, "m")
    assert len(bytes.fromhex(key)) == 16
    assert ExpertWeights({"b": {"x": 1.0, "y": 2.0}, "a": 0.5}, version=3).cache_key(STAMPS, "m") == key
    others = [
        ExpertWeights({"a": 0.25, "b": {"x": 1.0, "y": 2.0}}).cache_key(STAMPS, "m"),
        ExpertWeights({"a": 0.5, "b": {"y": 2.0, "x": 1.0}}).cache_key(STAMPS, "m"),
        one.cache_key({"a": 1, "b": 3}, "m"),
        one.cache_key(STAMPS, "n"),
    ]
    assert len({key, *others}) == 5
    assert ExpertWeights({"a": 0.0}).cache_key(STAMPS, "m") == ExpertWeights().cache_key(STAMPS, "m")


def test_restricted_weights_lack_unknown_experts_and_patterns() -> None:
    weights = ExpertWeights({"a": 1.0, "b": {"*.mlp": 1.0, "*.gone": 2.0}, "c": 1.0})
    assert weights.restricted({"a", "b"}, ["0.mlp"]).weights == {"a": 1.0, "b": {"*.mlp": 1.0}}
    assert weights.restricted({"b"}, ["0.attn"]).weights == {}


@pytest.mark.parametrize("value", [True, "1", None, float("inf"), 1e31])
def test_a_value_that_is_no_weight_is_rejected(value: object) -> None:
    with pytest.raises(DeclarationError, match="the weight") as caught:
        checked_number(value, "weights.a")
    assert (caught.value.where, caught.value.mend) == ("weights.a", "give a number such as 0.6")
