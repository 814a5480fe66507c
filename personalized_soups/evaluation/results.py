"""The results of an evaluation, as plain data: the contents of results.json, and the input of report and pictures.

Every score is in [0, 1] and gated on validity: an answer that is ill-formed or off topic scores 0. `mean` is over the
dimensions. `joint` is the share of answers that are valid and on the wanted side of every dimension.
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
    """The base alone: `mean` and `joint` averaged over the combinations, `per_dimension` towards the high sides."""

    distinct_bigrams: float


class CombinationScores(Scores):
    """One combination, merged by one method. `per_dimension` is towards the sides of the combination.

    `weight` is the mixing weight of each expert, `base_joint` the base's joint score for the same sides.
    """

    sides: Sequence[str]
    method: str
    weight: float
    win_rate_vs_base: float
    win_rate_interval: Interval
    base_joint: float
    distinct_bigrams: NotRequired[float]


class ValidationScores(TypedDict):
    """The scores of one method with one weight on the validation topics."""

    method: str
    weight: float
    mean: float
    joint: float
    valid: float


class MethodScores(ValidationScores):
    """The scores of one method at its chosen weight on the evaluation's prompts, averaged over the combinations."""

    win_rate_vs_base: float
    distinct_bigrams: float


class Check(TypedDict):
    """One target: the measured value, its bar (a least value, a range, or words), and whether the value meets it."""

    name: str
    value: float | str
    bar: float | str | Sequence[float]
    met: bool


class Results(TypedDict):
    """All results of one evaluation.

    A point of a sweep is (w, score): the expert of the dimension's high side has the weight w, that of its low side
    1 - w, and the score is towards the high side. `num_prompts` is the number of prompts of a combination,
    `num_samples` the number of answers to a prompt. `files` maps captions to paths relative to the report.
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


class NamedAnswer(TypedDict):
    """The answer of one model, named "base" or by the sides it was merged for."""

    name: str
    answer: str


class Examples(TypedDict):
    """One prompt, answered by several models."""

    prompt: str
    answers: Sequence[NamedAnswer]


def name_of(sides: Sequence[str]) -> str:
    """Return a combination's name, its sides in full: `elementary + concise + friendly`."""
    return " + ".join(sides)


def combinations_of(results: Results) -> list[tuple[str, ...]]:
    """Return the distinct combinations, in the order of their first rows."""
    return list(dict.fromkeys(tuple(row["sides"]) for row in results["combinations"]))


def row_of(results: Results, sides: Sequence[str], method: str) -> CombinationScores:
    """Return the row of one combination under one method.

    Raises:
        ValueError: if the results have no such row.
    """
    for row in results["combinations"]:
        if tuple(row["sides"]) == tuple(sides) and row["method"] == method:
            return row
    raise ValueError(f"the results have no row for {name_of(sides)} merged by {method!r}")


def method_of(results: Results, method: str) -> MethodScores:
    """Return a method's averages over the combinations.

    Raises:
        ValueError: if the results have no such method.
    """
    for row in results["methods"]:
        if row["method"] == method:
            return row
    raise ValueError(f"the results have no averages for the method {method!r}")
