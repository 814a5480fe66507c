"""The parts of report and picture that compare systems show the figures of the results."""

from __future__ import annotations

import re
from itertools import product

import pytest

from personalized_soups.evaluation.comparison import Combination, compare
from personalized_soups.evaluation.pictures.heat_map import combinations_figure
from personalized_soups.evaluation.report import report
from personalized_soups.evaluation.results import Examples, ExternalComparison, Results
from personalized_soups.evaluation.scores import Graded

SIDES = {
    "expertise": ["elementary", "expert"],
    "informativeness": ["concise", "informative"],
    "style": ["unfriendly", "friendly"],
}
COMBINATIONS: list[Combination] = list(product(*SIDES.values()))
SYSTEMS = ("preference_prompting", "single_expert", "linear", "factor_average", "factor_linear", "soup_prompting")


def graded(turn: int, level: int, sides: Combination) -> Graded:
    """Return an answer that is on the wanted side of the first `level` dimensions."""
    every = [side for pair in SIDES.values() for side in pair]
    toward = {side: 0.25 for side in every} | {side: 0.75 for side in sides[:level]}
    return Graded(f"prompt {turn}", "words", valid=True, toward=toward, judged={side: 0.5 for side in every})


@pytest.fixture
def compared(results: Results) -> Results:
    answers: dict[tuple[str, Combination], list[Graded]] = {("base", ()): [graded(turn, 0, ()) for turn in range(4)]}
    for level, system in enumerate(SYSTEMS):
        for sides in COMBINATIONS:
            # The soups are right for 2 to 4 of 4 prompts, single experts and prompting for none.
            right = max(0, level - 1) if system != "soup_prompting" else 1
            answers[system, sides] = [graded(turn, 3 if turn < right else 1, sides) for turn in range(4)]
    comparison = compare(
        answers,
        sides=SIDES,
        combinations=COMBINATIONS,
        best_method="linear",
        single_experts={sides: sides[0] for sides in COMBINATIONS},
    )
    results["comparison"] = comparison
    external: ExternalComparison = {**comparison, "file": "koala*.jsonl", "num_in_file": 180, "num_skipped": 7}
    results["external"] = {"koala": external}
    results["memory"] = {"pairs": 3 * 2**30, "train": 2**30}
    return results


def rows_of(text: str, title: str) -> list[list[str]]:
    section = text.split(f"\n## {title}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    return [[re.sub(r"[*`]", "", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_the_report_has_every_system_with_intervals_and_judges(compared: Results, examples: Examples) -> None:
    text = report(compared, examples=examples)
    rows = {row[0]: row for row in rows_of(text, "Systems")}
    assert list(rows) == [
        *("base", "preference prompting", "single expert", "linear", "factor_average", "factor_linear"),
        "soup + prompting",
    ]
    for average in compared["comparison"]["averages"]:
        name = {"preference_prompting": "preference prompting", "single_expert": "single expert"}.get(
            average["system"], average["system"].replace("soup_prompting", "soup + prompting")
        )
        low, high = average["intervals"]["joint"]
        assert rows[name][1] == f"{average['joint']:.3f} [{low:.3f}, {high:.3f}]"
        assert rows[name][4:7] == [f"{score:.3f}" for score in average["per_dimension"].values()]
        assert rows[name][7:] == [f"{average['judged_joint']:.3f}", "0.500", "0.500", "0.500"]
    assert "- over base: +0.250 [" in text
    assert "- over soup + prompting: +0.000 [" in text


def test_the_report_says_which_scores_moved(compared: Results, examples: Examples) -> None:
    text = report(compared, examples=examples)
    rows = rows_of(text, "Is every score moved towards its side?")
    assert len(rows) == 24
    for row, movement in zip(rows, compared["comparison"]["movements"], strict=True):
        assert row[0] == " + ".join(movement["sides"])
        assert row[1] == movement["dimension"]
        assert row[4].startswith(f"{movement['difference']:+.3f} [")
        assert row[5] == ("yes" if movement["moved"] else "no")
        assert row[7] == "no"  # the judge's score is the same for all systems
    moved = sum(movement["moved"] for movement in compared["comparison"]["movements"])
    assert f"The chosen soup moved {moved} of 24 scores" in text
    assert "by the held-out judges 0." in text


def test_the_report_has_each_external_file_and_the_memory(compared: Results, examples: Examples) -> None:
    text = report(compared, examples=examples)
    assert r"### koala" in text
    assert r"4 of the 180 prompts of koala\*.jsonl, drawn at random. 7 prompts were too long" in text
    cost = {row[0]: row[1:] for row in rows_of(text, "Cost")}
    assert cost["pairs"] == ["31.2", "3.00"]
    assert cost["merge"] == ["2.1", "-"]
    assert cost["all"] == ["279.5", "3.00"]
    joint = rows_of(text, "Systems in each combination")
    assert len(joint) == 8
    assert joint[0][3].endswith("(elementary)")  # the expert of the single-expert system


def test_the_picture_has_a_column_for_each_further_system(compared: Results) -> None:
    texts = [text.get_text() for text in combinations_figure(compared).axes[0].texts]
    heads = ["alone", "prompt", "alone", "expert", "linear", "average", "linear", "prompt", "score", "answers"]
    assert [text for text in texts if text in heads][: len(heads)] == heads  # the names of sides come after them
    shown = texts[texts.index("prompt") + 3 :][:8]  # below the heading of two lines: a note, then the cells
    by_prompting = [row["joint"] for row in compared["comparison"]["rows"] if row["system"] == "preference_prompting"]
    assert shown == [f"{joint:.2f}" for joint in by_prompting]
