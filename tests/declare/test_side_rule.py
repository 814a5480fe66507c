from __future__ import annotations

from dataclasses import dataclass

import pytest

from personalized_soups.declare.profile import Profile
from personalized_soups.declare.side_rule import Opposed, SideRule
from personalized_soups.errors import DeclarationError


@dataclass(frozen=True)
class Known:
    name: str
    side: str | None = None
    dimension: str | None = None


def test_a_record_wins_over_the_shipped_catalogue() -> None:
    rule = SideRule.of([Known("friendly", dimension="mood"), Known("unfriendly")])
    assert rule.dimension_of == {"friendly": "mood", "unfriendly": "style"}
    assert rule.opposed(["friendly", "unfriendly"]) is None


def test_an_expert_without_a_record_takes_its_dimension_from_its_side_or_its_name() -> None:
    rule = SideRule.of([Known("mine", side="friendly"), Known("unfriendly"), Known("someone")])
    assert rule.dimension_of == {"mine": "style", "unfriendly": "style"}
    assert rule.opposed(["someone", "mine", "unfriendly"]) == Opposed("mine", "unfriendly", "style")


def test_one_expert_alone_opposes_nobody() -> None:
    assert SideRule.of([Known("friendly")]).dimension_of == {}


def test_two_experts_of_one_side_do_not_oppose_each_other() -> None:
    rule = SideRule.of([Known("friendly-1", "friendly", "style"), Known("friendly-2", "friendly", "style")])
    assert rule.opposed(["friendly-1", "friendly-2"]) is None


def test_the_error_names_both_sides_and_both_fixes() -> None:
    rule = SideRule.of([Known("friendly"), Known("unfriendly")])
    profile = Profile(weights={"friendly": 1.0, "unfriendly": 0.5})
    with pytest.raises(DeclarationError, match="'friendly' and 'unfriendly' are two sides of one dimension") as caught:
        rule.check(profile)
    assert "allow_opposed=True" in caught.value.mend
    rule.check(profile.model_copy(update={"allow_opposed": True}))
    rule.check(Profile(weights={"friendly": 1.0, "unfriendly": 0.0}))
