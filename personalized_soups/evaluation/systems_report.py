"""The report on a comparison of systems. Every number and verdict is computed from the results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from personalized_soups.evaluation.expert_checks import ExpertChecks
from personalized_soups.evaluation.page import Heading, Paragraph, Part, Picture, Sample, Samples, Table
from personalized_soups.evaluation.results import Interval, SystemScores, ValidationScores
from personalized_soups.evaluation.systems import (
    MOST_DIMENSIONS,
    TRAININGS,
    SystemsResults,
    Test,
    TrainingCost,
    duel_of,
)

_ALPHA = 0.05


def systems_report(results: SystemsResults, *, pictures: Mapping[str, Path], samples: Sequence[Sample]) -> list[Part]:
    """Return the parts of the report.

    Args:
        results: the figures.
        pictures: the PNG files of `win_rates`, `radars`, `fronts` and `trainings`. Missing ones are left out.
        samples: answers to show side by side.
    """
    parts: list[Part] = [
        Heading("Comparison of systems", level=1),
        Paragraph(_headline(results), is_important=True),
        Paragraph(
            f"{_prompts(results)} for each of {len(results['combinations'])} combinations of preferences. Intervals "
            "are 95% bootstraps over prompts. An answer counts for the joint score if it is valid and on the wanted "
            "side of every dimension."
        ),
        Heading("All systems"),
        _averages(results),
        *_seeds(results),
        Heading("Win rates on each dimension"),
        Paragraph(
            f"Against {_title(_reference(results))}: two answers to a prompt are compared on each dimension, and a tie "
            "counts as half a win."
        ),
        _win_rates(results),
        *_picture(pictures, "win_rates", "Win rate of the row's system against the column's."),
        Heading("Win rates of all pairs"),
        _matrix(results),
        Heading("Each combination"),
        *_picture(pictures, "radars", "Scores towards each side, for each combination."),
        _combinations(results),
        Heading("Is the difference more than chance?"),
        Paragraph(
            "The primary comparison was named before the run. The p-values of the others are adjusted for their number "
            "(Holm)."
        ),
        _tests(results),
    ]
    parts += [*_choices(results), *_fronts(results, pictures), *_experts(results)]
    if any(cost["trainings"] for cost in results["costs"]):
        parts += [Heading("Cost"), _costs(results["costs"])]
        parts += [*_picture(pictures, "trainings", "Trainings for n dimensions."), _extrapolated(results["costs"])]
    if samples:
        parts += [Heading("Answers side by side"), Samples(samples)]
    return parts


def _headline(results: SystemsResults) -> str:
    test = results["primary"]
    low, high = test["interval"]
    name, other = _title(test["system"]), _title(test["minus"])
    if low > 0:
        verdict = f"{name} is better than {other}"
    elif high < 0:
        verdict = f"{name} is worse than {other}"
    else:
        verdict = f"between {name} and {other}, no difference was found"
    rate = duel_of(results, test["system"], test["minus"])
    return (
        f"{verdict[0].upper()}{verdict[1:]}: the joint score differs by {test['joint']:+.3f} "
        f"{_interval(test['interval'])}, p {_p(test['p_value'], equals='= ')}. {name[0].upper()}{name[1:]} wins "
        f"{rate['rate']:.1%} of {rate['num_judgements']} judgements."
    )


def _prompts(results: SystemsResults) -> str:
    number, seeds = results["num_prompts"], results["num_seeds"]
    return f"{number} held-out prompts" if seeds == 1 else f"{number // seeds} held-out prompts with {seeds} seeds each"


def _seeds(results: SystemsResults) -> list[Part]:
    if not results["seeds"]:
        return []
    first = results["first_seed"]
    head = ["joint", *(f"seed {first + at}" for at in range(results["num_seeds"])), "mean", "95% t interval"]
    rows = []
    for scores in results["seeds"]:
        name = _title(scores["system"]) + (f" minus {_title(scores['minus'])}" if "minus" in scores else "")
        mean, half = scores["mean"], scores["half"]
        interval = "" if half is None else _interval([mean - half, mean + half])
        rows.append([name, *(f"{value:.3f}" for value in scores["joint"]), f"{mean:.3f}", interval])
    return [
        Heading("Each seed"),
        Paragraph("Each seed has its own answers, and its own pairs and trainings, if the run has any."),
        Table(head, rows),
    ]


def _choices(results: SystemsResults) -> list[Part]:
    if not results["choices"]:
        return []
    rows = [
        [
            ", ".join(map(_title, choice["systems"])),
            str(choice["seed"]),
            score["method"],
            f"{score['weight']:g}",
            *_figures(score),
            chosen,
        ]
        for choice in results["choices"]
        for score in choice["scores"]
        for chosen in ("chosen" if (score["method"], score["weight"]) == (choice["method"], choice["weight"]) else "",)
    ]
    return [
        Heading("Method and weight"),
        Paragraph("The joint score on validation prompts, which are in no other table, chose method and weight."),
        Table(["system", "seed", "method", "weight", "joint", "mean", "valid", ""], rows),
    ]


def _figures(score: ValidationScores) -> list[str]:
    return [f"{score['joint']:.3f}", f"{score['mean']:.3f}", f"{score['valid']:.3f}"]


def _fronts(results: SystemsResults, pictures: Mapping[str, Path]) -> list[Part]:
    if not results["fronts"]:
        return []
    rows = [
        [
            _title(front["system"]),
            " and ".join(front["sides"]),
            str(len(front["points"])),
            f"{front['hypervolume']:.3f} {_interval(front['interval'])}",
            *(" ".join(f"({first:.2f}, {last:.2f})" for first, last in front["points"]),),
        ]
        for front in results["fronts"]
    ]
    return [
        Heading("Pareto fronts"),
        Paragraph(
            "Scores towards two sides of a dimension, for mixtures between them. If both sides have one scorer, the "
            "two scores of a valid answer add up to 1: then no front goes beyond the diagonal, and a system without "
            "mixtures between the ends has a small hypervolume however good its ends are."
        ),
        *_picture(pictures, "fronts", "Scores towards two sides, for mixtures between them."),
        Table(["system", "sides", "mixtures", "hypervolume", "scores"], rows, words=2),
        *_reach(results),
    ]


def _reach(results: SystemsResults) -> list[Part]:
    if not results["reach"]:
        return [Paragraph("With so many dimensions, the hypervolume over the wanted sides is not computed.")]
    rows = [
        [_title(each["system"]), str(each["num_mixtures"]), f"{each['hypervolume']:.3f} {_interval(each['interval'])}"]
        for each in results["reach"]
    ]
    return [
        Paragraph(
            "Over the wanted sides of a combination: the hypervolume that all mixtures of a system dominate, averaged "
            "over the combinations."
        ),
        Table(["system", "mixtures", "hypervolume"], rows),
    ]


def _experts(results: SystemsResults) -> list[Part]:
    if "experts" not in results:
        return []
    checks = results["experts"]
    alone = [
        [
            check["side"],
            f"{check['weight']:g}",
            f"{check['base']:.3f}",
            f"{check['score']:.3f}",
            f"{check['difference']:+.3f} {_interval(check['interval'])}",
            f"{check['valid']:.3f}",
            check["verdict"],
        ]
        for check in checks["alone"]
    ]
    sides = list(checks["alone"][0]["moved"])
    moved = [
        [check["side"], *(f"{check['moved'][side]:+.2f}" for side in sides)]
        for check in checks["alone"]
        if check["weight"] == checks["alone"][0]["weight"]
    ]
    pairs = [
        [
            check["side"],
            check["other"],
            f"{check['alone']:.3f}",
            f"{check['pair']:.3f}",
            f"{check['difference']:+.3f} {_interval(check['interval'])}",
            "yes" if check["interferes"] else "no",
        ]
        for check in sorted(checks["pairs"], key=lambda check: check["difference"])
    ]
    findings = [[found["severity"], found["what"], found["mend"]] for found in checks["findings"]]
    return [
        Heading("Does each expert work alone?"),
        Paragraph(_experts_headline(checks)),
        Table(["expert", "weight", "base", "alone", "difference", "valid", "verdict"], alone),
        Heading("What each expert moves"),
        Paragraph("The score towards each side of the column, minus the base's, with the expert of the row alone."),
        Table(["expert", *sides], moved),
        Heading("Which pairs interfere?"),
        Paragraph(
            f"The score towards a side with the experts of both at weight {checks['weight']:g}, minus that with its "
            "own expert alone. The intervals are not adjusted for the number of pairs."
        ),
        Table(["side", "with", "alone", "in the pair", "difference", "interferes"], pairs, words=2),
        Heading("What the doctor says"),
        Table(["", "finding", "mend"], findings, words=3) if findings else Paragraph("Nothing: the experts fit."),
    ]


def _experts_headline(checks: ExpertChecks) -> str:
    parts = []
    for verdict, text in (("fails", "These experts fail alone"), ("unclear", "More prompts are needed to judge these")):
        found = [
            f"{check['side']} at weight {check['weight']:g}" for check in checks["alone"] if check["verdict"] == verdict
        ]
        parts += [f"{text}: {', '.join(found)}."] if found else []
    harmed = [f"{check['other']} harms {check['side']}" for check in checks["pairs"] if check["interferes"]]
    parts += [f"Pairs that interfere: {'; '.join(harmed)}." if harmed else "No pair interferes."]
    return " ".join(parts if len(parts) > 1 else ["Every expert works alone.", *parts])


def _averages(results: SystemsResults) -> Table:
    is_judged = all("judged_joint" in scores for scores in results["averages"])
    dimensions = results["dimensions"]
    head = ["system", "joint", "mean", "valid", *dimensions, *(["joint, held-out judges"] if is_judged else [])]
    rows = []
    for scores in results["averages"]:
        row = [_title(scores["system"]), *(_with_interval(scores, name) for name in ("joint", "mean", "valid"))]
        row += [f"{scores['per_dimension'][name]:.2f}" for name in dimensions]
        rows.append([*row, *([f"{scores['judged_joint']:.3f}"] if is_judged else [])])
    return Table(head, rows)


def _with_interval(scores: SystemScores, name: str) -> str:
    values = {"joint": scores["joint"], "mean": scores["mean"], "valid": scores["valid"]}
    return f"{values[name]:.3f} {_interval(scores['intervals'][name])}"


def _win_rates(results: SystemsResults) -> Table:
    reference = _reference(results)
    rows = []
    duels = [duel for duel in results["duels"] if duel["against"] == reference]
    is_judged = all("judged" in duel for duel in duels)
    for duel in duels:
        per_dimension = [f"{duel['per_dimension'][name]:.1%}" for name in results["dimensions"]]
        judged = [f"{duel['judged']:.1%}"] if is_judged else []
        low, high = duel["interval"]
        rate = f"{duel['rate']:.1%} [{low:.1%}, {high:.1%}]"
        rows.append([_title(duel["system"]), rate, *per_dimension, *judged, str(duel["num_judgements"])])
    judge = ["held-out judges"] if is_judged else []
    return Table(["system", "wins", *results["dimensions"], *judge, "judgements"], rows)


def _matrix(results: SystemsResults) -> Table:
    names = [scores["system"] for scores in results["averages"]]
    rows = [
        [_title(name), *("" if name == other else f"{duel_of(results, name, other)['rate']:.2f}" for other in names)]
        for name in names
    ]
    return Table(["wins against", *map(_title, names)], rows)


def _combinations(results: SystemsResults) -> Table:
    names = [scores["system"] for scores in results["averages"]]
    joint = {(row["system"], tuple(row["sides"])): row["joint"] for row in results["rows"]}
    rows = [
        [" + ".join(sides), *(f"{joint[name, tuple(sides)]:.2f}" for name in names)]
        for sides in results["combinations"]
    ]
    return Table(["joint", *map(_title, names)], rows)


def _tests(results: SystemsResults) -> Table:
    def row(test: Test) -> list[str]:
        p_value = test.get("adjusted", test["p_value"])
        verdict = "yes" if p_value < _ALPHA else "no"
        name = f"{_title(test['system'])} minus {_title(test['minus'])}"
        kind = "further" if "adjusted" in test else "primary"
        return [name, kind, f"{test['joint']:+.3f} {_interval(test['interval'])}", _p(p_value), verdict]

    rows = [row(results["primary"]), *map(row, results["tests"])]
    return Table(["difference of joint scores", "comparison", "value", "p", f"p < {_ALPHA}"], rows, words=2)


def _costs(costs: Sequence[TrainingCost]) -> Table:
    rows = [
        [
            _title(cost["system"]),
            cost["grows"],
            str(cost["trainings"]),
            f"{cost['seconds']:.0f}",
            f"{cost['num_bytes'] / 1e6:.1f}",
        ]
        for cost in costs
    ]
    return Table(["system", "trainings for n dimensions", "here", "seconds", "MB"], rows, words=2)


def _extrapolated(costs: Sequence[TrainingCost]) -> Table:
    """Return the cost of 10 dimensions, if a training costs what it costs here."""
    rows = []
    for cost in costs:
        if cost["grows"] in TRAININGS and cost["trainings"]:
            number = TRAININGS[cost["grows"]](MOST_DIMENSIONS)
            times = number / cost["trainings"]
            hours, size = times * cost["seconds"] / 3600, times * cost["num_bytes"] / 1e6
            rows.append([_title(cost["system"]), str(number), f"{hours:.1f}", f"{size:.0f}"])
    return Table([f"at {MOST_DIMENSIONS} dimensions, extrapolated", "trainings", "hours", "MB"], rows)


def _reference(results: SystemsResults) -> str:
    """Return the system against which win rates are listed: the first."""
    return results["averages"][0]["system"]


def _picture(pictures: Mapping[str, Path], name: str, caption: str) -> list[Part]:
    return [Picture(pictures[name], caption)] if name in pictures else []


def _title(system: str) -> str:
    return system.replace("_", " ")


def _interval(interval: Interval) -> str:
    return f"[{interval[0]:.3f}, {interval[1]:.3f}]"


def _p(value: float, *, equals: str = "") -> str:
    return f"{equals}{value:.4f}" if value >= 0.0001 else "< 0.0001"
