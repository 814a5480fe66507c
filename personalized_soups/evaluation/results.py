"""Define the results of an evaluation: the contents of results.json. The report and the pictures are made from them.

Every score is in [0, 1]. An invalid answer, which is ill-formed or off topic, scores 0. `valid` is the share of valid
answers. `mean` is the mean score over answers and dimensions. `joint` is the share of answers that are valid and on the
wanted side of every dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NotRequired, TypedDict

Interval = Sequence[float]
"""Two numbers: the ends of a 95% interval."""


class Scores(TypedDict):
    """Scores of one model over all its answers."""

    mean: float
    joint: float
    valid: float
    per_dimension: Mapping[str, float]


class BaseScores(Scores):
    """Scores of the base alone.

    `mean` and `joint` are averaged over the combinations. `per_dimension` scores valid answers towards the high sides.
    """

    distinct_bigrams: float


class CombinationScores(Scores):
    """Scores of the model that one method has merged for one combination of sides.

    `per_dimension` scores towards the sides of the combination. `weight` is the weight of each expert, and `base_joint`
    is the base's joint score for the same sides.
    """

    sides: Sequence[str]
    method: str
    weight: float
    win_rate_vs_base: float
    win_rate_interval: Interval
    base_joint: float
    distinct_bigrams: NotRequired[float]


class ValidationScores(TypedDict):
    """Scores of one method at one weight on the validation topics, averaged over the combinations."""

    method: str
    weight: float
    mean: float
    joint: float
    valid: float


class MethodScores(ValidationScores):
    """Scores of one method at its chosen weight on the evaluation's prompts, averaged over the combinations."""

    win_rate_vs_base: float
    distinct_bigrams: float


class SystemScores(Scores):
    """Scores of one system: for one combination of sides, or averaged over all combinations, where `sides` is empty.

    `per_dimension` scores towards the sides of the combination; averaged, towards the wanted side of each combination.
    `intervals` has the 95% intervals of `mean`, `joint` and `valid`, from a bootstrap over prompts. `judged` and
    `judged_joint` are `per_dimension` and `joint` by the held-out judges. `expert` is the expert of `single_expert`.
    """

    system: str
    sides: Sequence[str]
    intervals: Mapping[str, Interval]
    judged: NotRequired[Mapping[str, float]]
    judged_joint: NotRequired[float]
    expert: NotRequired[str]


class Movement(TypedDict):
    """How far the best soup moved one dimension's score towards the wanted side: its score minus the base's.

    The interval is a 95% bootstrap over prompts of the paired difference. `judged` is the difference by the held-out
    judge. `moved` is whether `difference` is above 0.
    """

    sides: Sequence[str]
    dimension: str
    base: float
    soup: float
    difference: float
    interval: Interval
    moved: bool
    judged: NotRequired[float]


class Gain(TypedDict):
    """The best soup's joint score minus that of another system, averaged over the combinations.

    The interval is a 95% bootstrap over prompts of the paired difference.
    """

    over: str
    joint: float
    interval: Interval


class Comparison(TypedDict):
    """All systems of a study on the same prompts. The best soup is the soup of the results' `best_method`."""

    num_prompts: int
    rows: Sequence[SystemScores]
    averages: Sequence[SystemScores]
    movements: Sequence[Movement]
    gains: Sequence[Gain]


class JudgeReport(TypedDict):
    """How well a judge that the study trained tells the two ends apart, on prompts held out from its training.

    `auc` is the share of pairs of a high and a low answer that it orders right, and `auc_interval` its 95% interval.
    """

    num_answers: int
    auc: float
    auc_interval: Sequence[float]


class ExternalComparison(Comparison):
    """A comparison on prompts of a file that is not the study's own.

    `num_in_file` is the number of prompts in the file, and `num_skipped` that of those that were too long.
    """

    file: str
    num_in_file: int
    num_skipped: int


class Check(TypedDict):
    """One target: the measured value, its bar, and whether the value meets the bar.

    The bar is a minimum, a range, or words.
    """

    name: str
    value: float | str
    bar: float | str | Sequence[float]
    met: bool


class Results(TypedDict):
    """All results of one evaluation.

    A point of a sweep is (w, score). The expert of the dimension's high side has the weight w, and the expert of its
    low side has the weight 1 - w. The score is towards the high side. `num_prompts` is the number of prompts for each
    combination, and `num_samples` is the number of answers to each prompt. `files` maps captions to paths relative to
    the report. `memory` is an upper bound of the resident memory in each stage, in bytes: the sum of the largest
    memory of each process. `comparison` compares the systems that the recipe names, and `external` repeats this on
    other files of prompts, by name.
    """

    base: BaseScores
    combinations: Sequence[CombinationScores]
    selection: Sequence[ValidationScores]
    methods: Sequence[MethodScores]
    sweeps: Mapping[str, Sequence[Sequence[float]]]
    sweep_intervals: NotRequired[Mapping[str, Sequence[Interval]]]
    sides: Mapping[str, Sequence[str]]
    best_method: str
    num_prompts: int
    num_samples: int
    seconds: Mapping[str, float]
    seed: int
    basis: Literal["free", "shared"]
    checks: Sequence[Check]
    versions: Mapping[str, str]
    files: NotRequired[Mapping[str, str]]
    memory: NotRequired[Mapping[str, int]]
    comparison: NotRequired[Comparison]
    judges: NotRequired[Mapping[str, JudgeReport]]
    external: NotRequired[Mapping[str, ExternalComparison]]


class NamedAnswer(TypedDict):
    """The answer of one model. Its name is "base", or the sides that the model was merged for, or a system's name."""

    name: str
    answer: str


class Examples(TypedDict):
    """One prompt with the answers of several models."""

    prompt: str
    answers: Sequence[NamedAnswer]


def name_of(sides: Sequence[str]) -> str:
    """Return the name of a combination: its sides, e.g. `elementary + concise + friendly`."""
    return " + ".join(sides)


def title_of(system: str) -> str:
    """Return the name of a system as text: `soup_prompting` is `soup + prompting`. A method keeps its name."""
    return {
        "preference_prompting": "preference prompting",
        "single_expert": "single expert",
        "soup_prompting": "soup + prompting",
    }.get(system, system)


def combinations_of(results: Results) -> list[tuple[str, ...]]:
    """Return the distinct combinations in the order in which they first occur."""
    return list(dict.fromkeys(tuple(row["sides"]) for row in results["combinations"]))


def row_of(results: Results, sides: Sequence[str], method: str) -> CombinationScores:
    """Return the scores of one combination with one method.

    Raises:
        ValueError: if the results have no such scores.
    """
    for row in results["combinations"]:
        if tuple(row["sides"]) == tuple(sides) and row["method"] == method:
            return row
    raise ValueError(f"the results have no scores for {name_of(sides)} with the method {method!r}")


def method_of(results: Results, method: str) -> MethodScores:
    """Return the scores of a method, averaged over the combinations.

    Raises:
        ValueError: if the results have no scores of this method.
    """
    for row in results["methods"]:
        if row["method"] == method:
            return row
    raise ValueError(f"the results have no averages for the method {method!r}")
