"""Compare any number of systems that answered the same prompts for every combination of sides.

The paper's measure is the criterion-wise win rate: two answers to a prompt are compared on each dimension, towards the
wanted side, and a tie counts as half a win. Prompts are the clusters of all intervals and tests, because the answers to
one prompt are not independent, and neither are those of several seeds.

Shapes of the comments: P = prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import fsum
from typing import NotRequired, TypeAlias, TypedDict

from personalized_soups.evaluation.comparison import by_prompt, joint, over_seeds, system_scores
from personalized_soups.evaluation.expert_checks import ExpertChecks
from personalized_soups.evaluation.results import Interval, SystemScores, ValidationScores
from personalized_soups.evaluation.scores import Graded
from personalized_soups.evaluation.significance import holm, sign_flip_p_value, t_interval
from personalized_soups.evaluation.systems_fronts import Front, Reach
from personalized_soups.evaluation.win_rates import bootstrap_interval

Combination: TypeAlias = tuple[str, ...]
GradedAnswers: TypeAlias = Mapping[str, Mapping[Combination, Sequence[Graded]]]
"""The graded answers of each system for each combination."""

TRAININGS: Mapping[str, Callable[[int], int]] = {
    "2n": lambda n: 2 * n,
    "n": lambda n: n,
    "2^n": lambda n: 2**n,
    "1": lambda n: 1,
}
"""The number of trainings for n dimensions, by how it grows."""
MOST_DIMENSIONS = 10
"""The number of dimensions up to which costs are extrapolated."""


class Duel(TypedDict):
    """How often the answers of one system win against another system's.

    `rate` is the share of judgements that are won, where a tie is half a win. `per_dimension` has it for each
    dimension. The interval is a 95% bootstrap over prompts. `judged` is the rate by the held-out judges.
    """

    system: str
    against: str
    rate: float
    interval: Interval
    per_dimension: Mapping[str, float]
    num_judgements: int
    judged: NotRequired[float]


class Test(TypedDict):
    """The joint score of one system minus another's, with its interval and p-value.

    `adjusted` is the p-value after Holm's adjustment for the number of further comparisons. The primary comparison,
    which was named before the run, is not adjusted.
    """

    system: str
    minus: str
    joint: float
    interval: Interval
    p_value: float
    adjusted: NotRequired[float]


class TrainingCost(TypedDict):
    """What the trained parts of a system cost.

    `grows` says how the number of trainings grows with the number n of dimensions: `2n`, `2^n`, `1`, or `0` for a
    system without training. `seconds` and `num_bytes` are those of all trainings.
    """

    system: str
    trainings: int
    grows: str
    seconds: float
    num_bytes: int


class SeedScores(TypedDict):
    """The joint score of a system with each seed. `half` is half of the 95% t interval of their mean.

    In the row of a difference, `minus` is the other system.
    """

    system: str
    joint: Sequence[float]
    mean: float
    half: float | None
    minus: NotRequired[str]


class Choice(TypedDict):
    """What a choose step chose on validation prompts for some systems, and all scores."""

    systems: list[str]
    seed: int
    method: str
    weight: float
    scores: Sequence[ValidationScores]


class SystemsResults(TypedDict):
    """All figures of a comparison of systems: the contents of results.json of a report.

    `num_prompts` counts a prompt once for each seed.
    """

    num_prompts: int
    num_seeds: int
    first_seed: int
    combinations: Sequence[Sequence[str]]
    dimensions: Sequence[str]
    averages: Sequence[SystemScores]
    rows: Sequence[SystemScores]
    duels: Sequence[Duel]
    primary: Test
    tests: Sequence[Test]
    costs: Sequence[TrainingCost]
    seeds: Sequence[SeedScores]
    choices: Sequence[Choice]
    fronts: Sequence[Front]
    reach: Sequence[Reach]
    experts: NotRequired[ExpertChecks]


def compare_systems(
    answers: GradedAnswers,
    *,
    dimensions: Sequence[str],
    primary: tuple[str, str],
    costs: Sequence[TrainingCost] = (),
    num_seeds: int = 1,
    seed: int = 0,
) -> SystemsResults:
    """Return the scores of every system, all win rates, and the tests of the differences.

    Args:
        answers: the graded answers. All systems answered the same prompts in the same order for the same combinations.
        dimensions: the names of the dimensions, in the order of a combination's sides.
        primary: the two systems of the primary comparison. The first is also tested against all others.
        costs: the cost of each system.
        num_seeds: the number of seeds whose answers follow each other in each list of answers.
        seed: the first seed, which is also that of bootstraps and tests.

    Raises:
        ValueError: if the systems differ in their combinations or prompts.
    """
    combinations = list(next(iter(answers.values())))
    prompts = [entry.prompt for entry in answers[primary[0]][combinations[0]]]
    for system, by_combination in answers.items():
        if list(by_combination) != combinations:
            raise ValueError(f"the system {system!r} has other combinations than {next(iter(answers))!r}")
        if any([entry.prompt for entry in graded] != prompts for graded in by_combination.values()):
            raise ValueError(f"the system {system!r} has answered other prompts than {primary[0]!r}")
    first = primary[0]
    tests = {other: _test(answers, first, other, seed, num_seeds) for other in answers if other not in primary}
    adjusted = holm({other: test["p_value"] for other, test in tests.items()})
    return {
        "num_prompts": len(prompts),
        "num_seeds": num_seeds,
        "first_seed": seed,
        "combinations": [list(sides) for sides in combinations],
        "dimensions": list(dimensions),
        "averages": [
            system_scores(name, (), entries, dimensions, seed, num_seeds=num_seeds) for name, entries in answers.items()
        ],
        "rows": [
            system_scores(name, sides, {sides: graded}, dimensions, seed, num_seeds=num_seeds)
            for name, entries in answers.items()
            for sides, graded in entries.items()
        ],
        "duels": [
            _duel(answers, (name, other), dimensions, seed, num_seeds)
            for name in answers
            for other in answers
            if name != other
        ],
        "primary": _test(answers, *primary, seed, num_seeds),
        "tests": [{**test, "adjusted": adjusted[other]} for other, test in tests.items()],
        "costs": list(costs),
        "seeds": _seeds(answers, primary, num_seeds),
        "choices": [],
        "fronts": [],
        "reach": [],
    }


def duel_of(results: SystemsResults, system: str, against: str) -> Duel:
    """Return the win rate of one system against another.

    Raises:
        ValueError: if the results have none.
    """
    for duel in results["duels"]:
        if (duel["system"], duel["against"]) == (system, against):
            return duel
    raise ValueError(f"the results have no win rate of {system!r} against {against!r}")


def _duel(
    answers: GradedAnswers, systems: tuple[str, str], dimensions: Sequence[str], seed: int, num_seeds: int
) -> Duel:
    name, other = systems
    ours, theirs = answers[name], answers[other]
    per_dimension = {dimension: _points(ours, theirs, [at], judged=False) for at, dimension in enumerate(dimensions)}
    points_P = _points(ours, theirs, range(len(dimensions)), judged=False)
    duel: Duel = {
        "system": name,
        "against": other,
        "rate": _mean(points_P),
        "interval": list(bootstrap_interval(over_seeds(points_P, num_seeds), seed=seed)),
        "per_dimension": {dimension: _mean(points) for dimension, points in per_dimension.items()},
        "num_judgements": len(points_P) * len(ours) * len(dimensions),
    }
    if all(entry.judged for entries in (ours, theirs) for graded in entries.values() for entry in graded):
        duel["judged"] = _mean(_points(ours, theirs, range(len(dimensions)), judged=True))
    return duel


def _points(
    ours: Mapping[Combination, Sequence[Graded]],
    theirs: Mapping[Combination, Sequence[Graded]],
    places: Sequence[int],
    *,
    judged: bool,
) -> list[float]:
    """Return [P], the share of judgements that are won for each prompt. `places` are those of the dimensions."""

    def score(entry: Graded, side: str) -> float:
        return entry.judged[side] if judged else entry.toward[side]

    sums_P: list[float] = []
    for sides, graded in ours.items():
        for at, (mine, other) in enumerate(zip(graded, theirs[sides], strict=True)):
            won = fsum(_point(score(mine, sides[place]), score(other, sides[place])) for place in places)
            if at == len(sums_P):
                sums_P.append(0.0)
            sums_P[at] += won
    return [total / (len(ours) * len(places)) for total in sums_P]


def _point(mine: float, other: float) -> float:
    return 0.5 if abs(mine - other) < 1e-9 else float(mine > other)


def _test(answers: GradedAnswers, name: str, other: str, seed: int, num_seeds: int) -> Test:
    ours_P, theirs_P = (by_prompt(answers[each], joint, num_seeds) for each in (name, other))
    differences_P = [mine - theirs for mine, theirs in zip(ours_P, theirs_P, strict=True)]
    return {
        "system": name,
        "minus": other,
        "joint": _mean(differences_P),
        "interval": list(bootstrap_interval(differences_P, seed=seed)),
        "p_value": sign_flip_p_value(differences_P, seed=seed),
    }


def _seeds(answers: GradedAnswers, primary: tuple[str, str], num_seeds: int) -> list[SeedScores]:
    """Return the joint score of each system with each seed, and the primary difference, if there are several seeds."""
    if num_seeds == 1:
        return []
    by_system = {name: _by_seed(by_prompt(entries, joint), num_seeds) for name, entries in answers.items()}
    rows = [_seed_scores(name, values) for name, values in by_system.items()]
    first, second = primary
    differences = [mine - theirs for mine, theirs in zip(by_system[first], by_system[second], strict=True)]
    return [*rows, {**_seed_scores(first, differences), "minus": second}]


def _by_seed(values: Sequence[float], num_seeds: int) -> list[float]:
    size = len(values) // num_seeds
    return [_mean(values[at * size : (at + 1) * size]) for at in range(num_seeds)]


def _seed_scores(system: str, values: Sequence[float]) -> SeedScores:
    found = t_interval(values)
    half = None if found is None else found[1]
    return {"system": system, "joint": list(values), "mean": _mean(values), "half": half}


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
