"""Write the report of an evaluation in Markdown. Every number and verdict is computed from the results."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from personalized_soups.evaluation.comparison_report import (
    averages_table,
    combinations_table,
    external_sections,
    movements_table,
)
from personalized_soups.evaluation.markdown import plain, table
from personalized_soups.evaluation.monotone import judge_sweep
from personalized_soups.evaluation.results import (
    Check,
    Examples,
    MethodScores,
    Results,
    ValidationScores,
    combinations_of,
    method_of,
    name_of,
    row_of,
)


def report(results: Results, *, examples: Examples) -> str:
    """Return the report as Markdown. Scores have three decimals, except that the table of targets has six digits.

    Raises:
        ValueError: if the results lack a row or the averages of their best method.
    """
    sections: list[tuple[str, Callable[[Results], str]]] = [
        ("Base and best method", _base_and_best),
        ("Targets", _targets),
        ("Systems", _systems),
        ("Is every score moved towards its side?", _movements),
        ("Systems in each combination", _systems_by_combination),
        ("Other prompts", external_sections),
        ("Methods", _methods),
        ("Combinations", _combinations),
        ("How the weights were chosen", _selection),
        ("Sweeps", _sweeps),
        ("Time" if "memory" not in results else "Cost", _seconds),
        ("How it was made", _provenance),
        ("Files", _files),
    ]
    parts = [
        "# Evaluation of the merged models",
        _headline(results),
        "## One prompt, side by side",
        _examples(examples),
    ]
    for title, section in sections:
        if body := section(results):
            parts += [f"## {title}", body]
    return "\n\n".join(parts) + "\n"


def _headline(results: Results) -> str:
    base, best = results["base"]["joint"], method_of(results, results["best_method"])
    gain = best["joint"] - base
    what = f"`{best['method']}` with weight {best['weight']:g} for each expert"
    if gain > 0:
        times = f", {best['joint'] / base:.1f} times as much" if base > 0 else ""
        verdict = f"{what} raises the joint score from {base:.3f} (base alone) to {best['joint']:.3f}{times}"
    else:
        verdict = f"{what} does not raise the joint score: {best['joint']:.3f}, base alone {base:.3f}"
    combinations = combinations_of(results)
    rows = [row_of(results, sides, best["method"]) for sides in combinations]
    above = sum(row["joint"] > row["base_joint"] for row in rows)
    worst = min(rows, key=lambda row: row["win_rate_vs_base"])
    return (
        f"**Over {len(combinations)} combinations of preferences, {verdict}.** "
        f"It is above the base in {above} of them; "
        f"its answers win {best['win_rate_vs_base']:.1%} of the comparisons with the base's (ties count half), "
        f"{worst['win_rate_vs_base']:.1%} in the worst combination, {name_of(worst['sides'])}."
        f"{_met(results['checks'])}"
    )


def _met(checks: Sequence[Check]) -> str:
    return f" {sum(check['met'] for check in checks)} of {len(checks)} targets are met." if checks else ""


def _examples(examples: Examples) -> str:
    answers = examples["answers"]
    head = [plain(answer["name"]) for answer in answers]
    body = table(head, [[plain(answer["answer"]) for answer in answers]], words=len(answers))
    return f"**Prompt:** {plain(examples['prompt'])}\n\n{body}"


def _base_and_best(results: Results) -> str:
    base, best = results["base"], method_of(results, results["best_method"])
    pairs = [
        ("mean", base["mean"], best["mean"]),
        ("joint", base["joint"], best["joint"]),
        ("valid", base["valid"], best["valid"]),
        ("distinct bigrams", base["distinct_bigrams"], best["distinct_bigrams"]),
    ]
    rows = [[name, _score(ours), _score(theirs), f"{theirs - ours:+.3f}"] for name, ours, theirs in pairs]
    alone = ", ".join(
        f"{plain(dimension)} {score:.3f} (towards {plain(results['sides'][dimension][1])})"
        for dimension, score in base["per_dimension"].items()
    )
    head = ["", "base", f"`{best['method']}`", "difference"]
    return (
        f"{table(head, rows)}\n\n"
        "Scores are gated on validity. The mean is over the dimensions, towards the sides asked for; joint is the "
        "share of answers that are valid and on the asked side of every dimension.\n\n"
        f"The base alone in each dimension: {alone}."
    )


def _targets(results: Results) -> str:
    rows = [[plain(c["name"]), _of_check(c["value"]), _of_check(c["bar"]), _yes(c["met"])] for c in results["checks"]]
    return table(["target", "value", "bar", "met"], rows) if rows else ""


def _of_check(value: float | str | Sequence[float]) -> str:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, Sequence):
        return " to ".join(_of_check(end) for end in value)
    return f"{value:.6g}"


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"


def _methods(results: Results) -> str:
    base, best = results["base"]["distinct_bigrams"], results["best_method"]
    rows = [
        [
            _emphasised(f"`{method['method']}`", method["method"] == best),
            f"{method['weight']:g}",
            *(_score(method["mean"]), _score(method["joint"]), _score(method["valid"])),
            _score(method["win_rate_vs_base"]),
            _score(method["distinct_bigrams"]),
            f"{method['distinct_bigrams'] / base:.2f}" if base > 0 else "-",
        ]
        for method in results["methods"]
    ]
    head = ["method", "weight", "mean", "joint", "valid", "win rate", "distinct bigrams", "of the base's"]
    return f"Averages over the combinations, each method at its own weight.\n\n{table(head, rows)}{_overtaken(results)}"


def _overtaken(results: Results) -> str:
    """Return a note on methods whose joint score is higher than the chosen method's, or '' if there are none."""
    best = method_of(results, results["best_method"])
    higher = [method for method in results["methods"] if method["joint"] > best["joint"]]
    if not higher:
        return ""
    names = ", ".join(f"`{method['method']}` ({method['joint']:.3f})" for method in higher)
    return f"\n\nHigher joint score here than the chosen `{best['method']}` ({best['joint']:.3f}): {names}."


def _combinations(results: Results) -> str:
    dimensions = list(results["sides"])
    with_bigrams = all("distinct_bigrams" in row for row in results["combinations"])
    rows = []
    for row in sorted(results["combinations"], key=lambda row: combinations_of(results).index(tuple(row["sides"]))):
        low, high = row["win_rate_interval"]
        rows.append(
            [
                plain(name_of(row["sides"])),
                _emphasised(f"`{row['method']}`", row["method"] == results["best_method"]),
                f"{row['weight']:g}",
                *(_score(row[key]) for key in ("mean", "joint", "base_joint", "valid")),
                *(_score(row["per_dimension"][dimension]) for dimension in dimensions),
                f"{_score(row['win_rate_vs_base'])} [{_score(low)}, {_score(high)}]",
                *([_score(row["distinct_bigrams"])] if with_bigrams else []),
            ]
        )
    head = ["combination", "method", "weight", "mean", "joint", "base's joint", "valid", *map(plain, dimensions)]
    head += ["win rate [95% interval]", *(["distinct bigrams"] if with_bigrams else [])]
    return (
        f"{results['num_prompts']} prompts for each combination, answers to each prompt: {results['num_samples']}. A "
        f"dimension's score is towards the side that the combination asks for.\n\n{table(head, rows, words=2)}"
    )


def _selection(results: Results) -> str:
    if not results["selection"]:
        return ""
    chosen = {method["method"]: method["weight"] for method in results["methods"]}
    rows = []
    for trial in results["selection"]:
        is_chosen = chosen.get(trial["method"]) == trial["weight"]
        scores = [f"{trial['weight']:g}", *(_score(score) for score in (trial["mean"], trial["joint"], trial["valid"]))]
        rows.append([f"`{trial['method']}`", *(_emphasised(text, is_chosen) for text in scores)])
    reasons = " ".join(_reason(results["selection"], method) for method in results["methods"])
    intro = "Scores on the validation topics, averaged over the combinations; the chosen weights in bold."
    return f"{intro} {reasons}\n\n{table(['method', 'weight', 'mean', 'joint', 'valid'], rows)}"


def _reason(selection: Sequence[ValidationScores], method: MethodScores) -> str:
    trials = [trial for trial in selection if trial["method"] == method["method"]]
    what = f"`{method['method']}`: {method['weight']:g}"
    chosen = [trial for trial in trials if trial["weight"] == method["weight"]]
    if not chosen:
        return f"{what}, which is not among the weights tried."
    better = [trial for trial in trials if trial["joint"] > chosen[0]["joint"]]
    if not better:
        return f"{what}, the highest joint score of {len(trials)} tried."
    rank = f"number {len(better) + 1} by joint score of {len(trials)} tried"
    is_safer = all(trial["valid"] < chosen[0]["valid"] for trial in better)
    return f"{what}, {rank}{'; the weights before it break more answers' if is_safer else ''}."


def _sweeps(results: Results) -> str:
    rows = []
    for dimension, points in results["sweeps"].items():
        low, high = results["sides"][dimension]
        verdict = judge_sweep(points, results.get("sweep_intervals", {}).get(dimension))
        ends = [_score(points[0][1]), _score(points[-1][1])]
        rows.append([plain(dimension), plain(f"{low} to {high}"), str(verdict), *ends])
    if not rows:
        return ""
    return (
        "The weight w moves from one side's expert to its opposite's (w and 1 - w); the score is towards the second "
        "side. A dip is noise where the 95% intervals of its two points overlap.\n\n"
        f"{table(['dimension', 'from, to', 'verdict', 'score at w = 0', 'score at w = 1'], rows, words=3)}"
    )


def _systems(results: Results) -> str:
    if "comparison" not in results:
        return ""
    return averages_table(results["comparison"], results["best_method"], results.get("judges"))


def _movements(results: Results) -> str:
    return movements_table(results["comparison"]) if "comparison" in results else ""


def _systems_by_combination(results: Results) -> str:
    return combinations_table(results["comparison"]) if "comparison" in results else ""


def _seconds(results: Results) -> str:
    seconds, memory = results["seconds"], results.get("memory", {})
    if not seconds:
        return ""
    rows = [[plain(stage), f"{spent:.1f}", _gibibytes(memory.get(stage))] for stage, spent in seconds.items()]
    rows.append(
        ["**all**", f"**{sum(seconds.values()):.1f}**", f"**{_gibibytes(max(memory.values(), default=None))}**"]
    )
    if not memory:
        return table(["stage", "seconds"], [row[:2] for row in rows])
    note = "The memory is an upper bound: the sum of the largest resident memory of each process."
    return f"{note}\n\n{table(['stage', 'seconds', 'memory in GiB'], rows)}"


def _gibibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


def _provenance(results: Results) -> str:
    versions = ", ".join(f"{plain(name)} {plain(version)}" for name, version in results["versions"].items())
    per_merge = fmean(len(sides) for sides in combinations_of(results))
    lines = [
        f"- seed: {results['seed']}",
        f"- basis of the experts: {results['basis']}",
        f"- experts: {sum(len(sides) for sides in results['sides'].values())}, {per_merge:g} in each merge",
        f"- versions: {versions}",
    ]
    return "\n".join(lines)


def _files(results: Results) -> str:
    files = results.get("files", {})
    pictures = [f"![{plain(what)}](<{path}>)" for what, path in files.items() if path.endswith(".png")]
    listed = "\n".join(f"- {plain(what)}: [{plain(path)}](<{path}>)" for what, path in files.items())
    return "\n\n".join([*([listed] if listed else []), *pictures])


def _score(value: float) -> str:
    return f"{value:.3f}"


def _emphasised(text: str, is_best: bool) -> str:
    return f"**{text}**" if is_best else text
