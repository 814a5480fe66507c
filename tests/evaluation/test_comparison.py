"""The comparison of systems, against figures that NumPy computes from random scores."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from personalized_soups.evaluation.comparison import Combination, compare
from personalized_soups.evaluation.results import Comparison, SystemScores
from personalized_soups.evaluation.scores import Graded

SIDES = {"expertise": ("elementary", "expert"), "style": ("unfriendly", "friendly")}
COMBINATIONS: list[Combination] = list(itertools.product(*SIDES.values()))
SYSTEMS = ("base", "single_expert", "linear", "soup_prompting")
NUM_PROMPTS = 11


class Scores:
    """Random scores. `toward[s, c, p, d]` is the score of system s for combination c, prompt p, dimension d."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        shape = (len(SYSTEMS), len(COMBINATIONS), NUM_PROMPTS, len(SIDES))
        self.high = rng.random(shape)  # the value of the scorer, which is the score towards the high side
        self.judge = rng.random(shape)
        self.valid = rng.random(shape[:3]) < 0.8
        # The base has one answer for all combinations.
        for values in (self.high, self.judge, self.valid):
            values[0] = values[0, :1]

    def answers(self, *, judged: bool = True) -> dict[tuple[str, Combination], list[Graded]]:
        found = {}
        for s, system in enumerate(SYSTEMS):
            for c, combination in enumerate(COMBINATIONS):
                key = ("base", ()) if system == "base" else (system, combination)
                found[key] = [self._graded(s, c, p, judged=judged) for p in range(NUM_PROMPTS)]
        return found

    def _graded(self, s: int, c: int, p: int, *, judged: bool) -> Graded:
        valid = bool(self.valid[s, c, p])

        def toward(values: np.ndarray) -> dict[str, float]:
            pairs = zip(SIDES.values(), values, strict=True)
            return {
                side: valid * float(v if side == high else 1 - v) for (low, high), v in pairs for side in (low, high)
            }

        by_judge = toward(self.judge[s, c, p]) if judged else {}
        return Graded(f"prompt {p}", "an answer", valid, toward(self.high[s, c, p]), by_judge)

    def wanted(self, values: np.ndarray) -> np.ndarray:
        """Return the scores [S, C, P, D] towards the sides of each combination; 0 for invalid answers."""
        high = np.array([[side in {"expert", "friendly"} for side in sides] for sides in COMBINATIONS])
        return np.where(high[None, :, None], values, 1 - values) * self.valid[..., None]


def compared(scores: Scores, *, judged: bool = True) -> Comparison:
    return compare(
        scores.answers(judged=judged),
        sides=SIDES,
        combinations=COMBINATIONS,
        best_method="linear",
        single_experts={sides: sides[1] for sides in COMBINATIONS},
        seed=3,
    )


def row(comparison: Comparison, system: str, sides: Combination) -> SystemScores:
    (found,) = [each for each in comparison["rows"] if each["system"] == system and tuple(each["sides"]) == sides]
    return found


def test_every_figure_of_every_row_and_average() -> None:
    scores = Scores()
    found = compared(scores)
    assert found["num_prompts"] == NUM_PROMPTS
    assert len(found["rows"]) == len(SYSTEMS) * len(COMBINATIONS)
    toward, judged = scores.wanted(scores.high), scores.wanted(scores.judge)
    joint, judged_joint = np.all(toward > 0.5, axis=-1), np.all(judged > 0.5, axis=-1)
    for s, system in enumerate(SYSTEMS):
        (average,) = [each for each in found["averages"] if each["system"] == system]
        rows = [(row(found, system, sides), slice(c, c + 1)) for c, sides in enumerate(COMBINATIONS)]
        for scored, c in [*rows, (average, slice(None))]:
            assert scored["mean"] == pytest.approx(toward[s, c].mean())
            assert scored["joint"] == pytest.approx(joint[s, c].mean())
            assert scored["valid"] == pytest.approx(scores.valid[s, c].mean())
            assert scored["judged_joint"] == pytest.approx(judged_joint[s, c].mean())
            assert list(scored["per_dimension"].values()) == pytest.approx(toward[s, c].mean(axis=(0, 1)))
            assert list(scored["judged"].values()) == pytest.approx(judged[s, c].mean(axis=(0, 1)))
            for name, values in (("mean", toward.mean(axis=-1)), ("joint", joint), ("valid", scores.valid)):
                low, high = scored["intervals"][name]
                assert low <= scored[name] + 1e-12  # type: ignore[literal-required]
                assert high >= scored[name] - 1e-12  # type: ignore[literal-required]
                # Resampling whole prompts gives the spread of the prompts' means, not that of all C * P answers.
                per_prompt = values[s, c].mean(axis=0)
                spread = per_prompt.std() / np.sqrt(NUM_PROMPTS)
                # The interval of a normal mean is 3.92 standard errors wide. With 11 prompts in steps of 1/11 or 1/44,
                # the quantiles of 2000 resamples are within a quarter of it.
                assert high - low == pytest.approx(3.92 * spread, rel=0.25, abs=1 / NUM_PROMPTS)
    assert row(found, "single_expert", ("expert", "friendly"))["expert"] == "friendly"
    assert all("expert" not in each for each in found["rows"] if each["system"] != "single_expert")


def test_movements_and_gains_are_paired_with_the_best_soup() -> None:
    scores = Scores(4)
    found = compared(scores)
    toward, judged = scores.wanted(scores.high), scores.wanted(scores.judge)
    difference = (toward[2] - toward[0]).mean(axis=1)  # [C, D]
    by_judge = (judged[2] - judged[0]).mean(axis=1)
    assert len(found["movements"]) == difference.size
    for movement in found["movements"]:
        at = COMBINATIONS.index(tuple(movement["sides"])), list(SIDES).index(movement["dimension"])
        assert movement["difference"] == pytest.approx(difference[at])
        assert movement["soup"] - movement["base"] == pytest.approx(difference[at])
        assert movement["judged"] == pytest.approx(by_judge[at])
        assert movement["moved"] == (difference[at] > 0)
        assert movement["interval"][0] < movement["difference"] < movement["interval"][1]
    assert len({movement["moved"] for movement in found["movements"]}) == 2  # both answers occur
    joint = (toward > 0.5).all(axis=-1).mean(axis=(1, 2))
    gains = {gain["over"]: gain["joint"] for gain in found["gains"]}
    assert gains == {name: pytest.approx(joint[2] - joint[at]) for at, name in enumerate(SYSTEMS) if name != "linear"}


def test_the_interval_of_a_gain_is_that_of_paired_prompts() -> None:
    """Two systems that are right for the same prompts differ by nothing, however much prompts differ."""
    scores = Scores(2)
    answers = scores.answers()
    for sides in COMBINATIONS:
        answers["soup_prompting", sides] = answers["linear", sides]
    found = compare(answers, sides=SIDES, combinations=COMBINATIONS, best_method="linear")
    (gain,) = [each for each in found["gains"] if each["over"] == "soup_prompting"]
    assert gain == {"over": "soup_prompting", "joint": 0.0, "interval": [0.0, 0.0]}


def test_without_judges_nothing_is_said_of_them() -> None:
    found = compared(Scores(), judged=False)
    assert not any("judged" in each or "judged_joint" in each for each in [*found["rows"], *found["averages"]])
    assert not any("judged" in each for each in found["movements"])


def test_a_system_without_all_answers_is_refused() -> None:
    answers = Scores().answers()
    del answers["linear", COMBINATIONS[1]]
    with pytest.raises(ValueError, match=r"'linear' has no answers for elementary \+ friendly"):
        compare(answers, sides=SIDES, combinations=COMBINATIONS, best_method="linear")
    answers = Scores().answers()
    answers["linear", COMBINATIONS[1]].pop()
    with pytest.raises(ValueError, match="'linear' has 10 answers, but the base has 11"):
        compare(answers, sides=SIDES, combinations=COMBINATIONS, best_method="linear")
