"""Write the results of the study: a page, a picture, and the targets."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from pathlib import Path
from statistics import stdev
from typing import Any

from personalized_soups.evaluation.markdown import table
from personalized_soups.evaluation.pictures.answer_curves import AnswerCurve, AnswerPanel, draw_answer_curves
from personalized_soups.evaluation.results import Check
from personalized_soups.studies.papi.study import RULES, PapiStudy, SplitResults

SHOWN = (1, 2, 5, 10, 20)
BARS = {5: 0.815, 10: 0.832, 20: 0.845}
_NAMES = {
    "prediction": "active: settles the pairs to be predicted",
    "information": "active: log-determinant gain",
    "variance": "active: PReF's variance rule",
    "random": "random pairs",
}


def mean_share(splits: Sequence[SplitResults], rule: str, num_answers: int) -> float:
    """Return the share of correctly ordered pairs after some answers, as a mean over the splits."""
    return fsum(split["shares"][rule][num_answers] for split in splits) / len(splits)


def checks(splits: Sequence[SplitResults]) -> list[Check]:
    """Return every target with its measured value, its bar, and whether the value meets the bar."""
    most = len(splits[0]["shares"]["random"]) - 1
    rows = [
        Check(
            name=f"after {count} active answers",
            value=(value := mean_share(splits, "prediction", count)),
            bar=bar,
            met=value >= bar,
        )
        for count, bar in BARS.items()
        if count <= most
    ]
    if most >= 20:
        gap = mean_share(splits, "prediction", 10) - mean_share(splits, "random", 20)
        rows.append(Check(name="10 active minus 20 random answers", value=gap, bar=-0.005, met=gap >= -0.005))
    return rows


def summary(study: PapiStudy, splits: Sequence[SplitResults]) -> dict[str, Any]:
    """Return the content of results.json."""
    return {
        "num_known": study.num_known,
        "num_rewards": study.num_rewards,
        "splits": list(splits),
        "means": {
            rule: [mean_share(splits, rule, at) for at in range(len(splits[0]["shares"][rule]))] for rule in RULES
        },
        "common": fsum(split["common"] for split in splits) / len(splits),
        "all_ratings": fsum(split["all_ratings"] for split in splits) / len(splits),
        "checks": checks(splits),
    }


def table_rows(splits: Sequence[SplitResults]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table: one row for each rule, and one for each reference."""
    most = len(splits[0]["shares"]["random"]) - 1
    counts = [count for count in SHOWN if count <= most]
    rows = [
        [_NAMES[rule], *(_spread([split["shares"][rule][count] for split in splits]) for count in counts)]
        for rule in RULES
    ]
    for name, key in (("the common order", "common"), ("all ratings of the known statements", "all_ratings")):
        value = _spread([float(split[key]) for split in splits])  # type: ignore[literal-required] # one of two keys
        rows.append([name, *([value] * len(counts))])
    return ["", *(f"{count} answers" if count > 1 else "1 answer" for count in counts)], rows


def report(study: PapiStudy, splits: Sequence[SplitResults], picture: str = "papi.png") -> str:
    """Return the results as a Markdown page. `picture` is the path of the picture, relative to the page."""
    head, rows = table_rows(splits)
    people, known = splits[0]["num_people"], study.num_known
    targets = [
        [check["name"], f"at least {check['bar']:g}", f"{check['value']:.3f}", "yes" if check["met"] else "**no**"]
        for check in checks(splits)
    ]
    chosen = [
        [
            str(split["seed"]),
            *(f"{split['answering'][key]:g}" for key in ("scale", "threshold", "own_share")),
        ]
        for split in splits
    ]
    parts = [
        "# Real people: what a few answers tell",
        f"{len(splits)} splits of the people: the base rewards are learned from {known} people, and {people} other "
        "people are asked. A\nquestion shows two of the known statements. The answer comes from the person's own "
        "ratings, and equal ratings are\nanswered as a tie. The choice of a question uses only the earlier answers.\n\n"
        "The figures are the share of pairs of unseen statements, with different ratings, that the estimate puts in "
        "the right\norder. They are means over the new people, then over the splits, ± the standard deviation over "
        "splits.",
        table(head, rows, words=1),
        f"![Share of pairs in the right order against the number of answers]({picture})",
        "## Targets",
        table(["target", "bar", "measured", "met"], targets, words=1),
        "## How it works",
        f"A person's rating of a statement is modelled as `mean + w . phi + own part`. The {study.num_rewards} learned "
        "rewards come from a\nsingular value decomposition of the known people's ratings, centred by each statement's "
        "mean. One more reward is\nthe mean rating itself, because people differ in how much they share the common "
        "order. The prior of `w` is\nthe normal distribution of the known people's weights. The own part is what the "
        "learned rewards do not explain.\nIt is estimated for each statement that a person compares, so the active "
        "rules do not ask about the same\nstatements again and again. Ties follow the model of Rao and Kupper.\n\n"
        "Three numbers describe how answers depend on rewards. Each split chooses them among a few candidates, with\n"
        "simulated answers of its known people:",
        table(["split", "scale", "threshold", "own share"], chosen, words=0),
        "Data: the ratings that [PAlign](https://github.com/zhu-minjun/PAlign) published as PAPI. The statements are "
        "items of\nthe public-domain International Personality Item Pool.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(splits: Sequence[SplitResults], path: Path) -> Path:
    """Draw the shares against the number of answers as a PNG file, and return its path.

    Raises:
        UsageError: if matplotlib is missing.
    """
    results = {
        rule: [(float(at), mean_share(splits, rule, at)) for at in range(len(splits[0]["shares"][rule]))]
        for rule in RULES
    }
    short = {"prediction": "active", "information": "log-det", "variance": "variance", "random": "random"}
    common = fsum(split["common"] for split in splits) / len(splits)
    ceiling = fsum(split["all_ratings"] for split in splits) / len(splits)
    panel = AnswerPanel(
        "Share of pairs in the right order",
        f"pairs of unseen statements; {splits[0]['num_people']} new people, {len(splits)} splits",
        [AnswerCurve(short[rule], results[rule], at) for at, rule in enumerate(RULES)],
        [("common order", common), ("all ratings", ceiling)],
        (0.74, 0.87),
    )
    return draw_answer_curves("What a few answers tell", "Real people who rated statements", [panel], path)


def _spread(values: Sequence[float]) -> str:
    mean = fsum(values) / len(values)
    return f"{mean:.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def check_rows(checks: Sequence[Check]) -> list[list[Any]]:
    """Return the rows of the table of targets: name, bar, value, and whether the value meets the bar."""
    return [[check["name"], f"at least {check['bar']:g}", f"{check['value']:.3f}", check["met"]] for check in checks]
