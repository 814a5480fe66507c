"""The quickstart repeated over seeds, with free and with shared basis, and the page that tells what came out."""

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
    """Run the study for seeds 0, 1, ... and both kinds of basis below `out`; finished runs are read, not repeated."""
    found: dict[Basis, list[Results]] = {}
    for basis in BASES:
        for seed in range(num_seeds):
            study = Study(seed=seed, basis=basis, num_workers=num_workers, device=device)
            results, _ = run_study(study, out / f"{basis}-{seed}", stage=stage, overwrite=overwrite)
            found.setdefault(basis, []).append(results)
    return found


def quality_page(found: dict[Basis, list[Results]]) -> str:
    """Return the Markdown page: every figure that has a target, run by run and on average; the methods compared."""
    runs = [results for basis in found for results in found[basis]]
    count = max(len(found[basis]) for basis in found)
    first = runs[0]
    parts = [
        "# Quality of the merged models",
        f"Written by `make quality`: `psoups quickstart` for {count} seeds, with free and with shared basis.\n"
        f"Scores are taken on {first['num_prompts']} held-out prompts for each of eight combinations; method and\n"
        "weight are chosen on validation topics. What the figures mean: [evaluation](evaluation.md).",
        "## The best method of each run",
        _best_table(found),
        "## Methods, each at its own best weight",
        "The joint score on held-out prompts; in brackets the weight of each expert.",
        _method_table(found),
        "## Targets",
        "A figure that does not reach its bar is bold.",
        _target_table(found),
        "## The base alone",
        _base_table(found),
        f"Versions: {', '.join(f'{name} {version}' for name, version in first['versions'].items())}.",
    ]
    return "\n\n".join(parts) + "\n"


def _best_table(found: dict[Basis, list[Results]]) -> str:
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
    for basis, results in found.items():
        figures = [_best_figures(each) for each in results]
        for each, values in zip(results, figures, strict=True):
            best = method_of(each, each["best_method"])
            rows.append(
                [basis, str(each["seed"]), best["method"], f"{best['weight']:g}", *(f"{x:.3f}" for x in values)]
            )
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


def _method_table(found: dict[Basis, list[Results]]) -> str:
    methods = [row["method"] for row in next(iter(found.values()))[0]["methods"]]
    rows = []
    for basis, results in found.items():
        for each in results:
            cells = [f"{row['joint']:.3f} ({row['weight']:g})" for row in each["methods"]]
            rows.append([basis, str(each["seed"]), *cells])
        columns = [[method_of(each, method)["joint"] for each in results] for method in methods]
        rows.append([f"**{basis}**", "mean ± sd", *(_spread(column) for column in columns)])
    return table(["basis", "seed", *methods], rows, words=2)


def _target_table(found: dict[Basis, list[Results]]) -> str:
    runs = [results for basis in found for results in found[basis]]
    head = ["target", "bar", *(f"{basis} {results['seed']}" for basis in found for results in found[basis])]
    rows = []
    for place, first in enumerate(runs[0]["checks"]):
        checks = [results["checks"][place] for results in runs]
        values = [_value(check, results) for check, results in zip(checks, runs, strict=True)]
        cells = [value if check["met"] else f"**{value}**" for check, value in zip(checks, values, strict=True)]
        rows.append([first["name"], _bar(first), *cells])
    return table(head, rows, words=2)


def _value(check: Check, results: Results) -> str:
    """Return a check's figure; of a sweep the largest dip."""
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


def _base_table(found: dict[Basis, list[Results]]) -> str:
    results = next(iter(found.values()))
    dimensions = list(results[0]["base"]["per_dimension"])
    rows = [
        [
            str(each["seed"]),
            f"{each['base']['valid']:.3f}",
            f"{each['base']['joint']:.3f}",
            *(f"{each['base']['per_dimension'][name]:.3f}" for name in dimensions),
        ]
        for each in results
    ]
    return table(["seed", "valid", "joint", *dimensions], rows, words=1)


def _spread(values: Sequence[float]) -> str:
    mean = fsum(values) / len(values)
    return f"{mean:.3f} ± {stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"
