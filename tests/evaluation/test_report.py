from __future__ import annotations

import re

import pytest

from personalized_soups.evaluation.report import report
from personalized_soups.evaluation.results import Examples, Results


def _section(text: str, title: str) -> str:
    """Return the body below one heading."""
    return text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]


def _rows(section: str) -> list[list[str]]:
    """Return a table's rows below its head, as cells without emphasis and code marks."""
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[re.sub(r"[*`]", "", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_headline_says_the_measured_gain(results: Results, examples: Examples) -> None:
    headline = report(results, examples=examples).split("\n\n")[1]
    assert "from 0.110 (base alone) to 0.675, 6.1 times as much" in headline
    assert "`linear` with weight 0.55 for each expert" in headline
    assert "above the base in 8 of them" in headline
    assert "79.8% in the worst combination, expert + informative + unfriendly" in headline
    assert "2 of 3 targets are met" in headline


def test_a_gain_that_is_none_is_not_claimed(results: Results, examples: Examples) -> None:
    results["methods"][0]["joint"] = 0.1
    assert "does not raise the joint score: 0.100, base alone 0.110" in report(results, examples=examples)
    results["base"]["joint"] = 0.0
    assert "from 0.000 (base alone) to 0.100.**" in report(results, examples=examples)  # no ratio to zero


def test_every_combination_and_method_has_its_numbers(results: Results, examples: Examples) -> None:
    rows = _rows(_section(report(results, examples=examples), "Combinations"))
    assert len(rows) == 24
    found = {(row[0], row[1]): row[2:] for row in rows}
    for row in results["combinations"]:
        low, high = row["win_rate_interval"]
        assert found[" + ".join(row["sides"]), row["method"]] == [
            f"{row['weight']:g}",
            *(f"{row[key]:.3f}" for key in ("mean", "joint", "base_joint", "valid")),
            *(f"{score:.3f}" for score in row["per_dimension"].values()),
            f"{row['win_rate_vs_base']:.3f} [{low:.3f}, {high:.3f}]",
        ]


def test_methods_selection_seconds_and_base_equal_the_results(results: Results, examples: Examples) -> None:
    text = report(results, examples=examples)
    assert _rows(_section(text, "Methods"))[1] == [
        *("factor_average", "2.2", "0.831", "0.585", "0.946"),
        *("0.813", "0.287", "0.92"),
    ]
    selection = _rows(_section(text, "How the weights were chosen"))
    assert selection == [
        [row["method"], f"{row['weight']:g}", f"{row['mean']:.3f}", f"{row['joint']:.3f}", f"{row['valid']:.3f}"]
        for row in results["selection"]
    ]
    assert "`linear`: 0.55, the highest joint score of 3 tried" in text
    assert _rows(_section(text, "Time"))[-1] == ["all", "279.5"]
    assert _rows(_section(text, "Base and best method"))[1] == ["joint", "0.110", "0.675", "+0.565"]
    assert "informativeness 0.446 (towards informative)" in text
    assert "- seed: 7" in text
    assert "personalized_soups 0.1.0, torch 2.13.0" in text


def test_a_missed_target_is_named_and_not_rounded_away(results: Results, examples: Examples) -> None:
    rows = _rows(_section(report(results, examples=examples), "Targets"))
    assert rows[1] == ["base expertise, within", "0.503", "0.4 to 0.6", "yes"]
    assert rows[2] == ["joint score, at least", "0.6496", "0.65", "no"]


def test_the_report_says_where_the_choice_was_not_the_best(results: Results, examples: Examples) -> None:
    assert "Higher joint score here" not in report(results, examples=examples)
    results["methods"][1]["joint"] = 0.7
    results["selection"][0]["joint"] = 0.695
    text = report(results, examples=examples)
    assert "Higher joint score here than the chosen `linear` (0.675): `factor_average` (0.700)." in text
    assert "`linear`: 0.55, number 2 by joint score of 3 tried." in text
    results["selection"][0]["valid"] = 0.5
    assert "`linear`: 0.55, number 2 by joint score of 3 tried; the weights before it break more answers." in report(
        results, examples=examples
    )


def test_answers_stand_side_by_side_as_they_were_written(results: Results, examples: Examples) -> None:
    section = _section(report(results, examples=examples), "One prompt, side by side")
    assert "**Prompt:** How do I clean an old kettle?" in section
    assert r"Sure, my friend!<br>Wash the \*old\* kettle \| enjoy!" in section
    assert len(_rows(section)) == 1


def test_sweeps_have_a_verdict_and_files_a_place(results: Results, examples: Examples) -> None:
    text = report(results, examples=examples)
    verdicts = {row[0]: row[1:] for row in _rows(_section(text, "Sweeps"))}
    assert verdicts["expertise"] == ["elementary to expert", "monotone", "0.020", "0.951"]
    assert verdicts["informativeness"][1] == "monotone within noise: largest dip 0.006, from w = 0.9 to 1"
    assert "[my experts/](<my experts/>)" in text
    assert "![the combinations](<combinations.png>)" in text


def test_what_was_not_measured_has_no_section(results: Results, examples: Examples) -> None:
    del results["files"]
    results["sweeps"], results["checks"], results["selection"] = {}, [], []
    text = report(results, examples=examples)
    for title in ("Files", "Sweeps", "Targets", "How the weights were chosen"):
        assert f"## {title}" not in text
    assert "targets" not in text


def test_a_best_method_without_averages_is_refused(results: Results, examples: Examples) -> None:
    results["best_method"] = "ties"
    with pytest.raises(ValueError, match="no averages for the method 'ties'"):
        report(results, examples=examples)
