"""Which single expert is chosen for a combination of sides."""

from __future__ import annotations

from personalized_soups.evaluation.scores import Graded
from personalized_soups.studies.choosing import best_expert

SIDES = ("elementary", "expert", "unfriendly", "friendly")


def answers(*scores: tuple[float, float], valid: bool = True) -> list[Graded]:
    """Return answers with scores towards `expert` and `friendly`, and 1 minus these towards their opposites."""
    return [
        Graded(
            "prompt",
            "answer",
            valid,
            dict(zip(SIDES, (1 - expertise, expertise, 1 - style, style) if valid else (0.0,) * 4, strict=True)),
        )
        for expertise, style in scores
    ]


def test_the_highest_joint_score_wins_and_the_mean_breaks_ties() -> None:
    by_side = {
        "elementary": answers((0.0, 0.4), (0.0, 0.4)),
        "expert": answers((0.6, 0.6), (0.9, 0.1)),  # joint for expert and friendly: 1 of 2
        "unfriendly": answers((0.9, 0.9), (0.9, 0.9)),  # the best for expert and friendly, but the wrong expert
        "friendly": answers((0.4, 1.0), (0.4, 1.0)),  # joint 0, but the higher mean
    }
    assert best_expert(by_side, ("expert", "friendly")) == "expert"
    by_side["expert"] = answers((0.6, 0.4), (0.6, 0.4))  # both have joint 0: means 0.5 and 0.7
    assert best_expert(by_side, ("expert", "friendly")) == "friendly"
    by_side["friendly"] = answers((1.0, 1.0), valid=False)
    assert best_expert(by_side, ("expert", "friendly")) == "expert"
