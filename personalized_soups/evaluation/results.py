"""What an evaluation found, as plain data: what results.json holds and what the report and the pictures are made from.

Every score is in [0, 1] and gated on validity: an answer that is not well formed or not on topic scores nothing.
The mean is over the dimensions; joint is the share of answers that are valid and on the asked side of every dimension.
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
    """The base alone; mean and joint are averages over the combinations, `per_dimension` is towards the high sides."""

    distinct_bigrams: float


class CombinationScores(Scores):
    """One combination merged by one method; `per_dimension` is towards the side that the combination asks for.

    `weight` is the mixing weight of each of its experts, `base_joint` the base's joint score for the same sides.
    """

    sides: Sequence[str]
    method: str
    weight: float
    win_rate_vs_base: float
    win_rate_interval: Interval
    base_joint: float
    distinct_bigrams: NotRequired[float]


class ValidationScores(TypedDict):
    """One weight that was tried for one method, on the validation topics."""

    method: str
    weight: float
    mean: float
    joint: float
    valid: float


class MethodScores(ValidationScores):
    """One method at its chosen weight, averaged over the combinations, on the evaluation's own prompts."""

    win_rate_vs_base: float
    distinct_bigrams: float


class Check(TypedDict):
    """One target: what was measured, what it has to reach (a bar, its words, or a range), whether it does."""

    name: str
    value: float | str
    bar: float | str | Sequence[float]
    met: bool


class Results(TypedDict):
    """Everything that one evaluation found.

    A point of a sweep is (w, score): the expert of the dimension's high side weighs w, that of its low side 1 - w, and
    the score is towards the high side. `num_prompts` counts a combination's prompts, `num_samples` a prompt's answers.
    `files` names what was written beside the report: a caption and a path relative to it.
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
    """What the model of this name ("base", or the sides it was merged for) answered."""

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
    """Return the combinations, each once, in the order of their first rows."""
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
