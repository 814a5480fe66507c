"""Compute the figures of results.json from graded answers, and check whether they meet the targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Literal

from personalized_soups.adapters.provenance import library_versions
from personalized_soups.declare.profile import MethodName
from personalized_soups.evaluation.monotone import judge_sweep
from personalized_soups.evaluation.results import (
    BaseScores,
    Check,
    CombinationScores,
    Comparison,
    Examples,
    MethodScores,
    Results,
    ValidationScores,
    name_of,
)
from personalized_soups.evaluation.scores import (
    Graded,
    distinct_bigrams,
    joint_share,
    mean_toward,
    mean_worth,
    num_bigrams,
    valid_share,
    worth,
)
from personalized_soups.evaluation.win_rates import bootstrap_interval, win_rate

Combination = tuple[str, ...]
HeldOut = Mapping[tuple[str, Combination], Sequence[Graded]]
_BASE: tuple[str, Combination] = ("base", ())


def score_selection(method: str, weight: float, graded: Mapping[Combination, Sequence[Graded]]) -> ValidationScores:
    """Return the scores of a method at one weight on the validation prompts, averaged over the combinations."""
    return {
        "method": method,
        "weight": weight,
        "mean": _mean([mean_worth(entries, sides) for sides, entries in graded.items()]),
        "joint": _mean([joint_share(entries, sides) for sides, entries in graded.items()]),
        "valid": _mean([valid_share(entries) for entries in graded.values()]),
    }


def best_weight(selection: Sequence[ValidationScores], method: str, *, min_valid: float = 0.0) -> float:
    """Return the weight at which a method has its highest joint score. The mean score breaks ties.

    Args:
        selection: the scores on the validation prompts.
        method: the method.
        min_valid: the least share of valid answers, as a share of that of the method's most valid weight.
    """
    return _best([row for row in selection if row["method"] == method], min_valid)["weight"]


def best_of_method(selection: Sequence[ValidationScores], *, min_valid: float = 0.0) -> str:
    """Return the method whose best weight has the highest joint score. The mean score breaks ties.

    Args:
        selection: the scores on the validation prompts.
        min_valid: as for `best_weight`.
    """
    methods = dict.fromkeys(row["method"] for row in selection)
    best = [_best([row for row in selection if row["method"] == method], min_valid) for method in methods]
    return _best(best, 0.0)["method"]


def _best(rows: Sequence[ValidationScores], min_valid: float) -> ValidationScores:
    least = min_valid * max(row["valid"] for row in rows)
    return max((row for row in rows if row["valid"] >= least), key=lambda row: (row["joint"], row["mean"]))


def collect(
    *,
    study_sides: Mapping[str, tuple[str, str]],
    combinations: Sequence[Combination],
    weights: Mapping[MethodName, float],
    selection: Sequence[ValidationScores],
    held_out: HeldOut,
    sweeps: Mapping[str, Sequence[tuple[float, Sequence[Graded]]]],
    best_method: str,
    seed: int,
    basis: Literal["free", "shared"],
    seconds: Mapping[str, float],
    memory: Mapping[str, int] | None = None,
    comparison: Comparison | None = None,
) -> Results:
    """Return all results of the study.

    Args:
        study_sides: the low and the high side of each dimension.
        combinations: the combinations of sides.
        weights: the chosen weight of each method.
        selection: the scores on the validation prompts.
        held_out: the graded answers to the held-out prompts, by method and sides. The key `("base", ())` has the
            base's answers.
        sweeps: the weight and the graded answers of each step, by dimension.
        best_method: the method that was chosen on the validation prompts.
        seed: the study's seed, which also seeds the bootstrap.
        basis: the experts' basis.
        seconds: the seconds that each stage took.
        memory: the memory that each stage needed, in bytes.
        comparison: all systems on the held-out prompts, if the recipe names systems to compare.
    """
    alone = held_out[_BASE]
    rows = [
        _combination(
            study_sides=study_sides,
            sides=sides,
            method=method,
            weight=weight,
            entries=held_out[method, sides],
            alone=alone,
            seed=seed,
        )
        for method, weight in weights.items()
        for sides in combinations
    ]
    # All models draw the same number of bigrams: half of the bigrams of the model with the fewest. So even the draws of
    # this model, which are without replacement, differ.
    answers = {method: [e.answer for sides in combinations for e in held_out[method, sides]] for method in weights}
    base_answers = [entry.answer for entry in alone]
    sample = max(1, min(num_bigrams(texts) for texts in [base_answers, *answers.values()]) // 2)
    base: BaseScores = {
        "mean": _mean([mean_worth(alone, sides) for sides in combinations]),
        "joint": _mean([joint_share(alone, sides) for sides in combinations]),
        "valid": valid_share(alone),
        "per_dimension": {name: mean_toward(alone, high, of_valid=True) for name, (_, high) in study_sides.items()},
        "distinct_bigrams": _distinct(base_answers, sample, seed),
    }
    methods = [
        _method(method, weight, rows, _distinct(answers[method], sample, seed)) for method, weight in weights.items()
    ]
    points = {
        name: [[share, mean_toward(entries, study_sides[name][1])] for share, entries in steps]
        for name, steps in sweeps.items()
    }
    intervals = {
        name: [
            list(bootstrap_interval([entry.toward[study_sides[name][1]] for entry in entries], seed=seed))
            for _, entries in steps
        ]
        for name, steps in sweeps.items()
    }
    results: Results = {
        "base": base,
        "combinations": rows,
        "selection": list(selection),
        "methods": methods,
        "sweeps": points,
        "sweep_intervals": intervals,
        "sides": {name: list(sides) for name, sides in study_sides.items()},
        "best_method": best_method,
        "num_prompts": len(alone),
        "num_samples": 1,
        "seconds": dict(seconds),
        "seed": seed,
        "basis": basis,
        "checks": [],
        "versions": library_versions("torch", "transformers", "peft", "trl", "numpy"),
    }
    if memory is not None:
        results["memory"] = dict(memory)
    if comparison is not None:
        return {**results, "comparison": comparison, "checks": comparison_checks(comparison, best_method)}
    return {**results, "checks": checks(results)}


def comparison_checks(comparison: Comparison, best_method: str) -> list[Check]:
    """Return the targets of a study that compares systems.

    Args:
        comparison: all systems on the held-out prompts.
        best_method: the method of the best soup.
    """
    averages = {row["system"]: row for row in comparison["averages"]}
    gains = {gain["over"]: gain["joint"] for gain in comparison["gains"]}
    movements = comparison["movements"]
    num_moved = sum(movement["moved"] for movement in movements)
    valid = averages["base"]["valid"]
    targets = [_at_least("joint of the best soup minus the base's", gains["base"], 0.15)]
    if "preference_prompting" in gains:
        gain = gains["preference_prompting"]
        name = "joint of the best soup minus that of preference prompting"
        targets.append(Check(name=name, value=gain, bar="above 0", met=gain > 0))
    share = averages[best_method]["valid"] / valid if valid else 0.0
    return [
        *targets,
        _at_least("scores that moved towards their side, of all", num_moved / len(movements), 1.0),
        _at_least("valid, as a share of the base's", share, 0.9),
    ]


def checks(results: Results) -> list[Check]:
    """Return every target with its measured value, its bar, and whether the value meets the bar."""
    base, method = results["base"], results["best_method"]
    rows = [row for row in results["combinations"] if row["method"] == method]
    by_name = {row["method"]: row for row in results["methods"]}
    best = by_name[method]
    gains = [row["joint"] - row["base_joint"] for row in rows]
    wins = [row["win_rate_vs_base"] for row in rows]
    targets: list[Check] = [
        _at_least("base: valid and on topic", base["valid"], 0.95),
        *(
            Check(name=f"base: {name} in the middle", value=value, bar=[0.4, 0.6], met=0.4 <= value <= 0.6)
            for name, value in base["per_dimension"].items()
        ),
        _at_least("joint, average of the combinations", best["joint"], 0.65),
        Check(name="joint above the base's, least gain", value=min(gains), bar="above 0", met=min(gains) > 0),
        _at_least("win rate against the base, average", best["win_rate_vs_base"], 0.85),
        _at_least("win rate against the base, worst combination", min(wins), 0.65),
        _at_least("valid, as a share of the base's", best["valid"] / base["valid"], 0.93),
        _at_least(
            "distinct bigrams, as a share of the base's", best["distinct_bigrams"] / base["distinct_bigrams"], 0.8
        ),
    ]
    if {"linear", "factor_average"} <= by_name.keys():
        gap = by_name["linear"]["joint"] - by_name["factor_average"]["joint"]
        targets.append(_at_least("joint of linear minus joint of factor_average", gap, 0.0))
    for name, points in results["sweeps"].items():
        verdict = judge_sweep(points, results.get("sweep_intervals", {}).get(name))
        targets.append(
            Check(
                name=f"sweep of {name}",
                value=str(verdict),
                bar="monotone within noise",
                met=bool(verdict.is_monotone or verdict.is_within_noise),
            )
        )
    return targets


def example_answers(held_out: HeldOut, method: str, combinations: Sequence[Combination]) -> Examples:
    """Return one prompt with the answers of the base and of the personal models for three combinations.

    The prompt is the first prompt with four valid answers. If there is no such prompt, it is the first prompt.
    """
    shown = [combinations[1], combinations[-2], combinations[len(combinations) // 2 - 1]]
    models = {"base": held_out[_BASE]} | {name_of(sides): held_out[method, sides] for sides in shown}
    turns = range(len(held_out[_BASE]))
    chosen = next((turn for turn in turns if all(entries[turn].valid for entries in models.values())), 0)
    return {
        "prompt": held_out[_BASE][chosen].prompt,
        "answers": [{"name": name, "answer": entries[chosen].answer} for name, entries in models.items()],
    }


def _combination(
    *,
    study_sides: Mapping[str, tuple[str, str]],
    sides: Combination,
    method: str,
    weight: float,
    entries: Sequence[Graded],
    alone: Sequence[Graded],
    seed: int,
) -> CombinationScores:
    won = win_rate([worth(entry, sides) for entry in entries], [worth(entry, sides) for entry in alone], seed=seed)
    return {
        "sides": list(sides),
        "method": method,
        "weight": weight,
        "mean": mean_worth(entries, sides),
        "joint": joint_share(entries, sides),
        "valid": valid_share(entries),
        "per_dimension": {name: mean_toward(entries, side) for name, side in zip(study_sides, sides, strict=True)},
        "win_rate_vs_base": won.rate,
        "win_rate_interval": [won.low, won.high],
        "base_joint": joint_share(alone, sides),
    }


def _method(method: str, weight: float, rows: Sequence[CombinationScores], distinct: float) -> MethodScores:
    own = [row for row in rows if row["method"] == method]
    return {
        "method": method,
        "weight": weight,
        "mean": _mean([row["mean"] for row in own]),
        "joint": _mean([row["joint"] for row in own]),
        "valid": _mean([row["valid"] for row in own]),
        "win_rate_vs_base": _mean([row["win_rate_vs_base"] for row in own]),
        "distinct_bigrams": distinct,
    }


def _distinct(answers: Sequence[str], sample: int, seed: int) -> float:
    """Return the share of distinct bigrams, or 0 if the answers have no bigrams."""
    return distinct_bigrams(answers, sample=sample, seed=seed) if num_bigrams(answers) >= sample else 0.0


def _at_least(name: str, value: float, bar: float) -> Check:
    return {"name": name, "value": value, "bar": bar, "met": value >= bar}


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
