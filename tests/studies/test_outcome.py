"""The figures of results.json, computed from answers with known scores."""

from __future__ import annotations

import itertools

from personalized_soups.evaluation.results import Results, ValidationScores, method_of, row_of
from personalized_soups.evaluation.scores import Graded
from personalized_soups.studies import outcome

SIDES = {"expertise": ("elementary", "expert"), "style": ("unfriendly", "friendly")}
COMBINATIONS = list(itertools.product(*SIDES.values()))


def answer(turn: int, sides: tuple[str, ...], *, valid: bool = True) -> Graded:
    """Return an answer with score 1 towards `sides` and 0 towards their opposites."""
    toward = {side: float(valid and side in sides) for pair in SIDES.values() for side in pair}
    return Graded(f"prompt {turn}", f"word{turn} of {' '.join(sides)} and more words", valid, toward)


def results(broken: int = 0) -> Results:
    """Return results of a method whose answers are perfect except `broken`, and of a base that repeats one answer."""
    num_prompts = 8
    base = [answer(turn, ("elementary", "friendly")) for turn in range(num_prompts)]
    held_out: dict[tuple[str, tuple[str, ...]], list[Graded]] = {("base", ()): base}
    for method, sides in itertools.product(("linear", "factor_average"), COMBINATIONS):
        held_out[method, sides] = [answer(turn, sides, valid=turn >= broken) for turn in range(num_prompts)]
    selection = [
        outcome.score_selection("linear", 0.4, {sides: held_out["linear", sides] for sides in COMBINATIONS}),
        outcome.score_selection("factor_average", 0.6, {sides: base for sides in COMBINATIONS}),
    ]
    sweeps = {
        "expertise": [(0.0, base), (1.0, held_out["linear", ("expert", "friendly")])],
        "style": [(0.0, base), (1.0, held_out["linear", ("elementary", "unfriendly")])],  # falls: 1 to 0
    }
    return outcome.collect(
        study_sides=SIDES,
        combinations=COMBINATIONS,
        weights={"linear": 0.4, "factor_average": 0.6},
        selection=selection,
        held_out=held_out,
        sweeps=sweeps,
        best_method=outcome.best_of_method(selection),
        seed=0,
        basis="free",
        seconds={"train": 1.0},
    )


def test_the_figures_are_those_of_the_answers() -> None:
    found = results(broken=2)
    assert found["best_method"] == "linear"
    assert found["base"]["joint"] == 0.25  # right for one combination of four
    assert found["base"]["mean"] == 0.5
    assert found["base"]["per_dimension"] == {"expertise": 0.0, "style": 1.0}
    row = row_of(found, ("expert", "unfriendly"), "linear")
    assert (row["joint"], row["valid"], row["mean"], row["base_joint"]) == (0.75, 0.75, 0.75, 0.0)
    assert row["win_rate_vs_base"] == (6 + 2 / 2) / 8  # two broken answers tie with a base that suits no side
    assert row_of(found, ("elementary", "friendly"), "linear")["win_rate_vs_base"] == 6 / 2 / 8
    assert method_of(found, "linear")["joint"] == 0.75
    assert found["sweeps"]["expertise"] == [[0.0, 0.0], [1.0, 0.75]]


def test_a_target_is_met_where_its_figure_reaches_the_bar() -> None:
    checks = {check["name"]: check for check in results()["checks"]}
    assert checks["joint, average of the combinations"]["met"]
    assert checks["joint, average of the combinations"]["value"] == 1.0
    assert not checks["joint above the base's, least gain"]["met"]  # the base is perfect at one combination
    assert not checks["base: expertise in the middle"]["met"]
    assert checks["win rate against the base, worst combination"]["value"] == 0.5
    assert checks["sweep of expertise"]["met"]
    assert not checks["sweep of style"]["met"]
    assert checks["joint of linear minus joint of factor_average"]["met"]
    worse = {check["name"]: check for check in results(broken=1)["checks"]}
    assert worse["valid, as a share of the base's"]["value"] == 7 / 8
    assert not worse["valid, as a share of the base's"]["met"]


def test_a_method_keeps_its_best_weight() -> None:
    selection: list[ValidationScores] = [
        {"method": "linear", "weight": 0.4, "mean": 0.7, "joint": 0.5, "valid": 1.0},
        {"method": "linear", "weight": 0.6, "mean": 0.8, "joint": 0.5, "valid": 0.9},
        {"method": "factor_average", "weight": 0.8, "mean": 0.9, "joint": 0.6, "valid": 0.8},
    ]
    assert outcome.best_weight(selection, "linear") == 0.6
    assert outcome.best_of_method(selection) == "factor_average"


def test_a_weight_that_breaks_answers_is_not_chosen() -> None:
    selection: list[ValidationScores] = [
        {"method": "linear", "weight": 0.5, "mean": 0.6, "joint": 0.3, "valid": 1.0},
        {"method": "linear", "weight": 1.0, "mean": 0.7, "joint": 0.4, "valid": 0.9},
        {"method": "linear", "weight": 1.5, "mean": 0.8, "joint": 0.6, "valid": 0.89},
        {"method": "ties", "weight": 1.0, "mean": 0.7, "joint": 0.5, "valid": 0.5},  # its own best is all there is
    ]
    assert outcome.best_weight(selection, "linear") == 1.5
    assert outcome.best_weight(selection, "linear", min_valid=0.9) == 1.0
    assert outcome.best_weight(selection, "linear", min_valid=0.95) == 0.5
    assert outcome.best_of_method(selection) == "linear"
    assert outcome.best_of_method(selection, min_valid=0.9) == "ties"


def test_the_example_is_a_prompt_that_all_four_answer() -> None:
    combinations = COMBINATIONS
    held_out: dict[tuple[str, tuple[str, ...]], list[Graded]] = {
        ("base", ()): [answer(0, ("elementary", "friendly"), valid=False), answer(1, ("elementary", "friendly"))]
    }
    for sides in combinations:
        held_out["linear", sides] = [answer(0, sides), answer(1, sides)]
    shown = outcome.example_answers(held_out, "linear", combinations)
    assert shown["prompt"] == "prompt 1"
    names = [each["name"] for each in shown["answers"]]
    assert names == ["base", "elementary + friendly", "expert + unfriendly"]  # of four combinations two are opposite


def compared() -> Results:
    """Return results with a comparison of a base that is right for one combination and soups that are always right."""
    from personalized_soups.evaluation.comparison import compare

    base = [answer(turn, ("elementary", "friendly")) for turn in range(4)]
    held_out: dict[tuple[str, tuple[str, ...]], list[Graded]] = {("base", ()): base}
    for system in ("preference_prompting", "linear"):
        for sides in COMBINATIONS:
            right = sides if system == "linear" else ("elementary", "unfriendly")
            held_out[system, sides] = [answer(turn, right) for turn in range(4)]
    return outcome.collect(
        study_sides=SIDES,
        combinations=COMBINATIONS,
        weights={"linear": 0.4},
        selection=[outcome.score_selection("linear", 0.4, {sides: base for sides in COMBINATIONS})],
        held_out=held_out,
        sweeps={},
        best_method="linear",
        seed=0,
        basis="free",
        seconds={"train": 1.0},
        memory={"train": 5},
        comparison=compare(held_out, sides=SIDES, combinations=COMBINATIONS, best_method="linear"),
    )


def test_a_comparison_has_targets_of_its_own() -> None:
    found = compared()
    checks = {check["name"]: check for check in found["checks"]}
    assert checks["joint of the best soup minus the base's"]["value"] == 0.75  # right for 4 of 4 instead of 1 of 4
    assert checks["joint of the best soup minus the base's"]["met"]
    assert checks["joint of the best soup minus that of preference prompting"]["value"] == 0.75
    # The base is right for one side of each dimension. There it cannot be moved further: 2 of 4 times 2 dimensions.
    assert checks["scores that moved towards their side, of all"]["value"] == 0.5
    assert not checks["scores that moved towards their side, of all"]["met"]
    assert checks["valid, as a share of the base's"]["value"] == 1.0
    assert found["memory"] == {"train": 5}
    assert "comparison" not in results()
    assert "memory" not in results()


def test_answers_without_bigrams_have_no_distinct_bigrams() -> None:
    silent = [Graded(f"prompt {turn}", "", valid=False, toward={}, judged={}) for turn in range(2)]
    held_out: dict[tuple[str, tuple[str, ...]], list[Graded]] = {
        ("base", ()): [answer(turn, ("elementary", "friendly")) for turn in range(2)]
    }
    for sides in COMBINATIONS:
        toward = {side: 0.0 for pair in SIDES.values() for side in pair}
        held_out["linear", sides] = [Graded(each.prompt, "", valid=False, toward=toward) for each in silent]
    found = outcome.collect(
        study_sides=SIDES,
        combinations=COMBINATIONS,
        weights={"linear": 0.4},
        selection=[outcome.score_selection("linear", 0.4, {sides: held_out["base", ()] for sides in COMBINATIONS})],
        held_out=held_out,
        sweeps={},
        best_method="linear",
        seed=0,
        basis="free",
        seconds={},
    )
    assert found["methods"][0]["distinct_bigrams"] == 0.0
    assert found["base"]["distinct_bigrams"] == 1.0
