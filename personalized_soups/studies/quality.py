"""Repeat the quickstart over seeds, with free and with shared basis, and write the page of the results."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum
from pathlib import Path
from statistics import stdev
from typing import Literal, get_args

from personalized_soups.evaluation.markdown import table
from personalized_soups.evaluation.monotone import judge_sweep
from personalized_soups.evaluation.results import Check, Results, method_of
from personalized_soups.studies.quickstart import run_study
from personalized_soups.studies.study import Stage, Study

Basis = Literal["free", "shared"]
BASES: tuple[Basis, ...] = get_args(Basis)


def run_quality(
    out: Path, *, num_seeds: int, num_workers: int, device: str, stage: Stage, overwrite: bool = False
) -> dict[Basis, list[Results]]:
    """Run the quickstart for `num_seeds` seeds and both bases, and return the results. Finished runs are skipped.

    Each run writes to a folder below `out`, e.g. `free-0` for free basis and seed 0.
    """
    runs: dict[Basis, list[Results]] = {}
    for basis in BASES:
        for seed in range(num_seeds):
            study = Study(seed=seed, basis=basis, num_workers=num_workers, device=device)
            results, _ = run_study(study, out / f"{basis}-{seed}", stage=stage, overwrite=overwrite)
            runs.setdefault(basis, []).append(results)
    return runs


def quality_page(by_basis: dict[Basis, list[Results]]) -> str:
    """Return the results as a Markdown page: the best method of each run, all methods, and all targets."""
    runs = [results for basis in by_basis for results in by_basis[basis]]
    count = max(len(by_basis[basis]) for basis in by_basis)
    first = runs[0]
    parts = [
        "# Quality of the merged models",
        f"Written by `make quality`: `psoups quickstart` for {count} seeds, with free and with shared basis.\n"
        f"Scores are taken on {first['num_prompts']} held-out prompts for each of eight combinations; method and\n"
        "weight are chosen on validation topics. What the figures mean: [evaluation](evaluation.md).",
        "## The best method of each run",
        _best_table(by_basis),
        "## Methods, each at its own best weight",
        "The joint score on held-out prompts; in brackets the weight of each expert.",
        _method_table(by_basis),
        "## Targets",
        "A figure that does not reach its bar is bold.",
        _target_table(by_basis),
        "## The base alone",
        _base_table(by_basis),
        f"Versions: {', '.join(f'{name} {version}' for name, version in first['versions'].items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _best_table(by_basis: dict[Basis, list[Results]]) -> str:
    head = [
        "basis",
        "seed",
        "method",
        "weight",
        "mean",
        "joint",
        "base joint",
        "valid",
        "wins",
        "worst wins",
        "distinct",
    ]
    rows = []
    for basis, results in by_basis.items():
        figures = [_best_figures(run) for run in results]
        for run, values in zip(results, figures, strict=True):
            best = method_of(run, run["best_method"])
            rows.append([basis, str(run["seed"]), best["method"], f"{best['weight']:g}", *(f"{x:.3f}" for x in values)])
        rows.append([f"**{basis}**", "mean ± sd", "", "", *(_spread(column) for column in zip(*figures, strict=True))])
    return table(head, rows, words=3)


def _best_figures(results: Results) -> list[float]:
    best = method_of(results, results["best_method"])
    rows = [row for row in results["combinations"] if row["method"] == best["method"]]
    return [
        best["mean"],
        best["joint"],
        results["base"]["joint"],
        best["valid"],
        best["win_rate_vs_base"],
        min(row["win_rate_vs_base"] for row in rows),
        best["distinct_bigrams"] / results["base"]["distinct_bigrams"],
    ]


def _method_table(by_basis: dict[Basis, list[Results]]) -> str:
    methods = [row["method"] for row in next(iter(by_basis.values()))[0]["methods"]]
    rows = []
    for basis, results in by_basis.items():
        for run in results:
            cells = [f"{row['joint']:.3f} ({row['weight']:g})" for row in run["methods"]]
            rows.append([basis, str(run["seed"]), *cells])
        columns = [[method_of(run, method)["joint"] for run in results] for method in methods]
        rows.append([f"**{basis}**", "mean ± sd", *(_spread(column) for column in columns)])
    return table(["basis", "seed", *methods], rows, words=2)


def _target_table(by_basis: dict[Basis, list[Results]]) -> str:
    runs = [results for basis in by_basis for results in by_basis[basis]]
    head = ["target", "bar", *(f"{basis} {results['seed']}" for basis in by_basis for results in by_basis[basis])]
    rows = []
    for place, first in enumerate(runs[0]["checks"]):
        checks = [results["checks"][place] for results in runs]
        values = [_value(check, results) for check, results in zip(checks, runs, strict=True)]
        cells = [value if check["met"] else f"**{value}**" for check, value in zip(checks, values, strict=True)]
        rows.append([first["name"], _bar(first), *cells])
    return table(head, rows, words=2)


def _value(check: Check, results: Results) -> str:
    """Return the measured value of a check as text. The value of a sweep is its largest dip."""
    if not isinstance(check["value"], str):
        return f"{check['value']:.3f}"
    name = check["name"].removeprefix("sweep of ")
    return f"{judge_sweep(results['sweeps'][name]).largest_dip:.3f}"


def _bar(check: Check) -> str:
    bar = check["bar"]
    if isinstance(check["value"], str):
        return "largest dip within noise"
    if isinstance(bar, str):
        return bar
    return f"at least {bar:g}" if isinstance(bar, int | float) else f"{bar[0]:g} to {bar[1]:g}"


def _base_table(by_basis: dict[Basis, list[Results]]) -> str:
    results = next(iter(by_basis.values()))
    dimensions = list(results[0]["base"]["per_dimension"])
    rows = [
        [
            str(run["seed"]),
            f"{run['base']['valid']:.3f}",
            f"{run['base']['joint']:.3f}",
            *(f"{run['base']['per_dimension'][name]:.3f}" for name in dimensions),
        ]
        for run in results
    ]
    return table(["seed", "valid", "joint", *dimensions], rows, words=1)


def _spread(values: Sequence[float]) -> str:
    mean = fsum(values) / len(values)
    return f"{mean:.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"
