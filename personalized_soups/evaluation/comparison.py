"""Compare systems that answered the same prompts: the base, prompting, single experts and soups.

All intervals are 95% bootstraps over prompts. A prompt's answers for all combinations stay together when prompts are
resampled, because they are not independent.

Shapes of the comments: P = prompts, C = combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import fsum

from personalized_soups.evaluation.results import Comparison, Gain, Movement, SystemScores
from personalized_soups.evaluation.scores import Graded, worth
from personalized_soups.evaluation.win_rates import bootstrap_interval

Combination = tuple[str, ...]
Answers = Mapping[tuple[str, Combination], Sequence[Graded]]
"""The graded answers of each system for each combination. The key of the base's answers is `("base", ())`."""

BASE = "base"
SINGLE_EXPERT = "single_expert"
_Figure = Callable[[Graded, Combination], float]


def compare(
    answers: Answers,
    *,
    sides: Mapping[str, Sequence[str]],
    combinations: Sequence[Combination],
    best_method: str,
    single_experts: Mapping[Combination, str] | None = None,
    seed: int = 0,
) -> Comparison:
    """Return the scores of every system, averaged and for each combination, and how far the best soup moved the base.

    Args:
        answers: the graded answers. All systems answered the same prompts in the same order.
        sides: the low and the high side of each dimension.
        combinations: the combinations of sides.
        best_method: the method of the best soup, which is one of the systems.
        single_experts: the expert of the system `single_expert` for each combination.
        seed: the seed of the bootstrap.

    Raises:
        ValueError: if a system lacks a combination, or has not as many answers as the base.
    """
    systems = list(dict.fromkeys(system for system, _ in answers))
    by_system = {system: {each: _of(answers, system, each) for each in combinations} for system in systems}
    dimensions = list(sides)
    rows = []
    for system in systems:
        for combination in combinations:
            row = system_scores(system, combination, {combination: by_system[system][combination]}, dimensions, seed)
            if system == SINGLE_EXPERT and single_experts is not None:
                row["expert"] = single_experts[combination]
            rows.append(row)
    return {
        "num_prompts": len(answers[BASE, ()]),
        "rows": rows,
        "averages": [system_scores(system, (), by_system[system], dimensions, seed) for system in systems],
        "movements": [
            _movement(
                (combination, side, dimensions[at]),
                by_system[BASE][combination],
                by_system[best_method][combination],
                seed,
            )
            for combination in combinations
            for at, side in enumerate(combination)
        ],
        "gains": [
            _gain(system, by_system[system], by_system[best_method], seed)
            for system in systems
            if system != best_method
        ],
    }


def _of(answers: Answers, system: str, combination: Combination) -> Sequence[Graded]:
    """Return a system's answers for a combination. The base has the same answers for every combination."""
    found = answers.get((system, () if system == BASE else combination))
    if found is None:
        raise ValueError(f"the system {system!r} has no answers for {' + '.join(combination)}")
    if len(found) != len(answers[BASE, ()]):
        raise ValueError(f"the system {system!r} has {len(found)} answers, but the base has {len(answers[BASE, ()])}")
    return found


def joint(entry: Graded, sides: Combination) -> float:
    """Return 1 if the answer is valid and on the wanted side of every dimension, else 0."""
    return float(entry.valid and all(entry.toward[side] > 0.5 for side in sides))


def _judged_joint(entry: Graded, sides: Combination) -> float:
    return float(entry.valid and all(entry.judged[side] > 0.5 for side in sides))


def _valid(entry: Graded, _: Combination) -> float:
    return float(entry.valid)


_FIGURES: Mapping[str, _Figure] = {"mean": worth, "joint": joint, "valid": _valid}


def system_scores(
    system: str,
    combination: Combination,
    entries: Mapping[Combination, Sequence[Graded]],
    dimensions: Sequence[str],
    seed: int,
    *,
    num_seeds: int = 1,
) -> SystemScores:
    """Return the scores of one system, averaged over the combinations of `entries`.

    Args:
        system: the system's name.
        combination: the combination, or empty if the scores are averages.
        entries: the graded answers for each combination.
        dimensions: the names of the dimensions, in the order of a combination's sides.
        seed: the seed of the bootstrap.
        num_seeds: the number of seeds whose answers follow each other in each list.
    """
    values = {name: by_prompt(entries, figure, num_seeds) for name, figure in _FIGURES.items()}
    scores: SystemScores = {
        "system": system,
        "sides": list(combination),
        "mean": _mean(values["mean"]),
        "joint": _mean(values["joint"]),
        "valid": _mean(values["valid"]),
        "per_dimension": {
            name: _mean(by_prompt(entries, lambda entry, sides, at=at: entry.toward[sides[at]]))  # type: ignore[misc]
            for at, name in enumerate(dimensions)
        },
        "intervals": {name: list(bootstrap_interval(figures, seed=seed)) for name, figures in values.items()},
    }
    if all(entry.judged for graded in entries.values() for entry in graded):
        scores["judged"] = {
            name: _mean(by_prompt(entries, lambda entry, sides, at=at: entry.judged[sides[at]]))  # type: ignore[misc]
            for at, name in enumerate(dimensions)
        }
        scores["judged_joint"] = _mean(by_prompt(entries, _judged_joint))
    return scores


def _movement(
    wanted: tuple[Combination, str, str], base: Sequence[Graded], soup: Sequence[Graded], seed: int
) -> Movement:
    """Return how far a soup moved one dimension. `wanted` is a combination, one of its sides, and its dimension."""
    combination, side, dimension = wanted
    pairs = list(zip(soup, base, strict=True))
    differences_P = [ours.toward[side] - theirs.toward[side] for ours, theirs in pairs]
    difference = _mean(differences_P)
    movement: Movement = {
        "sides": list(combination),
        "dimension": dimension,
        "base": _mean([theirs.toward[side] for _, theirs in pairs]),
        "soup": _mean([ours.toward[side] for ours, _ in pairs]),
        "difference": difference,
        "interval": list(bootstrap_interval(differences_P, seed=seed)),
        "moved": difference > 0,
    }
    if all(ours.judged and theirs.judged for ours, theirs in pairs):
        movement["judged"] = _mean([ours.judged[side] - theirs.judged[side] for ours, theirs in pairs])
    return movement


def _gain(
    over: str, theirs: Mapping[Combination, Sequence[Graded]], soup: Mapping[Combination, Sequence[Graded]], seed: int
) -> Gain:
    pairs_P = zip(by_prompt(soup, joint), by_prompt(theirs, joint), strict=True)
    differences_P = [ours - other for ours, other in pairs_P]
    interval = bootstrap_interval(differences_P, seed=seed)
    return {"over": over, "joint": _mean(differences_P), "interval": list(interval)}


def by_prompt(entries: Mapping[Combination, Sequence[Graded]], figure: _Figure, num_seeds: int = 1) -> list[float]:
    """Return the figure of each prompt, averaged over the combinations and the seeds.

    Args:
        entries: the graded answers for each combination.
        figure: the figure of an answer.
        num_seeds: the number of seeds, which all have the same prompts and whose answers follow each other.
    """
    figures_CP = [[figure(entry, sides) for entry in graded] for sides, graded in entries.items()]
    return over_seeds([_mean(of_prompt) for of_prompt in zip(*figures_CP, strict=True)], num_seeds)


def over_seeds(values: Sequence[float], num_seeds: int) -> list[float]:
    """Return the mean of each prompt over seeds, because answers to one prompt are not independent."""
    size = len(values) // num_seeds
    return [_mean(values[at::size]) for at in range(size)]


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
