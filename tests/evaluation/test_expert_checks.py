"""Whether experts work alone and in pairs, on answers whose scores are known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from personalized_soups.evaluation.expert_checks import check_alone, check_pairs
from personalized_soups.evaluation.scores import Graded

SIDES = ("expert", "friendly")


def graded(expert: Sequence[float], friendly: Sequence[float], *, num_invalid: int = 0) -> list[Graded]:
    found = []
    for at, scores in enumerate(zip(expert, friendly, strict=True)):
        valid = at >= num_invalid
        found.append(Graded(f"prompt {at}", "a", valid, dict(zip(SIDES, scores if valid else (0.0, 0.0), strict=True))))
    return found


BASE = graded([0.5] * 20, [0.5] * 20)


def test_an_expert_works_fails_or_needs_more_prompts() -> None:
    mixtures = {
        ((), 0.0): BASE,
        (("expert",), 1.0): graded([0.8, 0.9] * 10, [0.4] * 20),
        (("expert",), 0.5): graded([0.0, 1.0] * 9 + [1.0, 1.0], [0.5] * 20),
        (("friendly",), 1.0): graded([0.5] * 20, [1.0] * 20, num_invalid=3),
        (("friendly",), 0.5): graded([0.5] * 20, [0.3] * 20),
        (("expert", "friendly"), 0.5): BASE,
    }
    checks = {(check["side"], check["weight"]): check for check in check_alone(mixtures, SIDES)}
    works = checks["expert", 1.0]
    assert works["verdict"] == "works"
    assert works["difference"] == pytest.approx(0.35)
    assert works["moved"] == pytest.approx({"expert": 0.35, "friendly": -0.1})
    assert checks["expert", 0.5]["verdict"] == "unclear"
    assert checks["friendly", 1.0]["verdict"] == "fails"  # 0.85 of the answers are valid
    assert checks["friendly", 1.0]["valid"] == pytest.approx(0.85)
    assert checks["friendly", 0.5]["verdict"] == "fails"


def test_an_expert_interferes_if_it_lowers_the_score_of_another() -> None:
    mixtures = {
        ((), 0.0): BASE,
        (("expert",), 0.6): graded([0.9] * 20, [0.5] * 20),
        (("friendly",), 0.6): graded([0.5] * 20, [0.9] * 20),
        (("expert",), 1.0): graded([1.0] * 20, [0.5] * 20),
        (("expert", "friendly"), 0.6): graded([0.6, 0.8] * 10, [0.8, 1.0] * 10),
    }
    harmed, other = check_pairs(mixtures)
    assert (harmed["side"], harmed["other"], harmed["interferes"]) == ("expert", "friendly", True)
    assert harmed["difference"] == pytest.approx(-0.2)
    assert harmed["alone"] == pytest.approx(0.9)  # at the weight of the pair
    assert (other["side"], other["other"], other["interferes"]) == ("friendly", "expert", False)
