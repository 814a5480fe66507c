"""Summarise the measurements of all seeds: agreement of single experts and soups, and how good the forecast was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import fsum
from typing import Any, NamedTuple

import numpy as np

from personalized_soups.evaluation.results import Check
from personalized_soups.scoring.margin_forecast import accuracy
from personalized_soups.studies.persona.combinations import (
    Combination,
    agreement,
    combinations,
    expert_name,
    mean_agreement,
)
from personalized_soups.studies.persona.seed_run import SeedRun
from personalized_soups.studies.persona.settings import CHOSEN, FACTORS, FITTED, JOINT, SIGNED, THIRD

# The targets: mean agreement of single experts, and the share of it that soups of three keep.
SINGLE_BAR, KEPT_BAR = 0.80, 0.80

_LINEAR = (THIRD, CHOSEN, FITTED, SIGNED)


class SystemRow(NamedTuple):
    """The results of one system for one group of traits, with one value for each seed.

    Attributes:
        traits: the group.
        system: the name of the system.
        means: the mean agreement over the combinations and traits.
        worst: the agreement of the trait with the lowest mean over the combinations.
        lowest: the lowest agreement of any trait in any combination.
        kept: `means` divided by the mean agreement of the wanted single experts, each on its own trait.
    """

    traits: tuple[str, ...]
    system: str
    means: tuple[float, ...]
    worst: tuple[float, ...]
    lowest: tuple[float, ...]
    kept: tuple[float, ...]


def expert_table(run: SeedRun) -> dict[str, dict[str, float]]:
    """Return the share of each trait's test statements that the base and each expert answer as with the trait."""
    store = run.test()
    return {
        name: {trait: accuracy(margins) for trait, margins in store.margins(name).items()}
        for name in ("base", *run.experts)
    }


def single_agreement(run: SeedRun) -> float:
    """Return the mean agreement of the experts, each with the wanted answers of its own trait."""
    return fsum(_own_agreement(run).values()) / len(run.experts)


def _own_agreement(run: SeedRun) -> dict[str, float]:
    store = run.test()
    return {
        expert_name(trait, has_trait=sign): accuracy(
            (1 if sign else -1) * store.margins(expert_name(trait, has_trait=sign))[trait]
        )
        for trait in run.study.traits_of(run.seed)
        for sign in (True, False)
    }


def system_rows(runs: Sequence[SeedRun]) -> list[SystemRow]:
    """Return a row for the base and for each system of each group of traits."""
    rows = []
    for triple in runs[0].study.triples:
        measured = [run for run in runs if triple in run.study.triples_of(run.seed)]
        systems = ["base", *runs[0].study.systems_of(0, triple)]
        for system in systems:
            able = [run for run in measured if system == "base" or system in run.study.systems_of(run.seed, triple)]
            rows.append(_row(able, triple, system))
    return rows


def _row(runs: Sequence[SeedRun], triple: tuple[str, ...], system: str) -> SystemRow:
    figures = [_figures(run, triple, system, combinations(triple)) for run in runs]
    return SystemRow(triple, system, *(tuple(column) for column in zip(*figures, strict=True)))


def _figures(
    run: SeedRun, triple: tuple[str, ...], system: str, chosen: Sequence[Combination]
) -> tuple[float, float, float, float]:
    own = _own_agreement(run)
    per_trait: dict[str, list[float]] = {trait: [] for trait in triple}
    for combination in chosen:
        for trait, share in agreement(margins_of(run, system, combination), combination).items():
            per_trait[trait].append(share)
    shares = [share for listed in per_trait.values() for share in listed]
    singles = [own[name] for combination in chosen for name in combination.experts]
    mean = fsum(shares) / len(shares)
    return (
        mean,
        min(fsum(listed) / len(listed) for listed in per_trait.values()),
        min(shares),
        mean / (fsum(singles) / len(singles)),
    )


def margins_of(run: SeedRun, system: str, combination: Combination) -> Mapping[str, Any]:
    """Return the test margins of the base, or of a system for a combination."""
    if system == "base":
        stored = run.test().margins("base")
        return {trait: stored[trait] for trait in combination.traits}
    return run.test(combination.traits).margins(f"{system} {combination.name}")


def joint_rows(runs: Sequence[SeedRun]) -> list[tuple[str, float, dict[str, float]]]:
    """Return, for each combination with a joint adapter, its mean agreement and that of each soup."""
    run = runs[0]
    rows = []
    for combination in run.study.joint_of(run.seed):
        soups = {
            system: mean_agreement(margins_of(run, system, combination), combination)
            for system in run.study.systems_of(run.seed, combination.traits)
        }
        rows.append((combination.name, mean_agreement(margins_of(run, JOINT, combination), combination), soups))
    return rows


class ForecastPoint(NamedTuple):
    """The forecast and the measured agreement of one trait in one linear soup.

    Attributes:
        system: the name of the system.
        forecast: the share of test statements that the soup was expected to answer as wanted.
        measured: the share that it answered as wanted.
        alone: the share that the trait's single expert answers as wanted.
    """

    system: str
    forecast: float
    measured: float
    alone: float


def forecast_points(runs: Sequence[SeedRun]) -> list[ForecastPoint]:
    """Return a point for each trait of each linear soup of all seeds. The forecast uses no soup."""
    return [point for run in runs for point in _points_of(run)]


def _points_of(run: SeedRun) -> Iterator[ForecastPoint]:
    forecasts, own = run.forecasts(run.test()), _own_agreement(run)
    for triple in run.study.triples_of(run.seed):
        for combination in combinations(triple):
            for system in _LINEAR:
                weights = run.soup(system, combination).weights
                measured = agreement(margins_of(run, system, combination), combination)
                for trait, name in zip(triple, combination.experts, strict=True):
                    margins = combination.sign_of(trait) * forecasts[trait].margins(weights)
                    yield ForecastPoint(system, accuracy(margins), measured[trait], own[name])


def moved_down(runs: Sequence[SeedRun]) -> float:
    """Return the share of opposite-sided experts that lower the agreement with their trait below the base's."""
    tables = [(run, expert_table(run)) for run in runs]
    moves = [
        table[expert_name(trait, has_trait=False)][trait] < table["base"][trait]
        for run, table in tables
        for trait in run.study.traits_of(run.seed)
    ]
    return fsum(moves) / len(moves)


def checks(runs: Sequence[SeedRun]) -> list[Check]:
    """Return every target with its measured value, its bar, and whether the value meets the bar.

    The soup of the targets is that with fitted weights, whatever the test says of the others.
    """
    single = fsum(map(single_agreement, runs)) / len(runs)
    rows = {(row.traits, row.system): row for row in system_rows(runs)}
    triples = runs[0].study.triples
    kept = min(_mean(rows[triple, FITTED].kept) for triple in triples)
    gap = min(_mean(rows[triple, FITTED].means) - _mean(rows[triple, FACTORS].means) for triple in triples)
    down = moved_down(runs)
    return [
        Check(name="single experts, mean agreement", value=single, bar=SINGLE_BAR, met=single >= SINGLE_BAR),
        Check(name="share of it that fitted soups of three keep", value=kept, bar=KEPT_BAR, met=kept >= KEPT_BAR),
        Check(
            name="linear with fitted weights minus factor_average, both chosen on validation",
            value=gap,
            bar=0.0,
            met=gap >= 0,
        ),
        Check(name="opposite experts that lower their trait", value=down, bar=1.0, met=down >= 1),
    ]


def results(runs: Sequence[SeedRun]) -> dict[str, Any]:
    """Return the content of results.json, without the costs."""
    points = forecast_points(runs)
    return {
        "traits": list(runs[0].study.traits),
        "num_seeds": len(runs),
        "experts": [expert_table(run) for run in runs],
        "single": [single_agreement(run) for run in runs],
        "systems": [row._asdict() for row in system_rows(runs)],
        "weights": [
            {combination.name: run.soup(FITTED, combination).weights for combination in combinations(triple)}
            for run in runs
            for triple in run.study.triples_of(run.seed)
        ],
        "joint": [list(row) for row in joint_rows(runs)],
        "forecast": {
            "points": [point._asdict() for point in points],
            "error": float(np.mean([abs(point.forecast - point.measured) for point in points])),
        },
        "probability": [run.test().probability("base") for run in runs],
        "checks": checks(runs),
    }


def _mean(values: Sequence[float]) -> float:
    return fsum(values) / len(values)
