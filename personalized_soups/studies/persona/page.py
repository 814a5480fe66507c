"""Write the results of the study as a Markdown page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from pathlib import Path
from typing import Any

from personalized_soups.evaluation.markdown import table
from personalized_soups.evaluation.pictures.forecast import draw_forecast
from personalized_soups.evaluation.significance import t_interval
from personalized_soups.studies.persona.combinations import combinations
from personalized_soups.studies.persona.seed_run import SeedRun
from personalized_soups.studies.persona.settings import FITTED
from personalized_soups.studies.persona.statements import SOURCE
from personalized_soups.studies.persona.summary import (
    checks,
    expert_table,
    forecast_points,
    joint_rows,
    single_agreement,
    system_rows,
)


def interval(values: Sequence[float]) -> str:
    """Return the mean of the values of some seeds with a 95% t interval, or the value of a single seed."""
    found = t_interval(values)
    return f"{fsum(values) / len(values):.2f}" if found is None else f"{found[0]:.2f} ± {found[1]:.2f}"


def expert_rows(runs: Sequence[SeedRun]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of the base and all experts on all traits."""
    tables = [expert_table(run) for run in runs]
    traits = runs[0].study.traits
    rows = []
    for name in tables[0]:
        known = [shown for shown in tables if name in shown]
        cells = []
        for trait in traits:
            values = [shown[name][trait] for shown in known if trait in shown[name]]
            text = interval(values)
            cells.append(f"**{text}**" if name in {trait, f"not-{trait}"} else text)
        rows.append([name, *cells])
    return ["expert", *traits], rows


def soup_rows(runs: Sequence[SeedRun]) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table of all soups."""
    rows = [
        [
            ", ".join(row.traits),
            row.system,
            interval(row.means),
            interval(row.kept),
            interval(row.worst),
            f"{min(row.lowest):.2f}",
        ]
        for row in system_rows(runs)
    ]
    return ["traits", "soup", "agreement", "share of single experts'", "worst trait", "lowest of all"], rows


def check_rows(runs: Sequence[SeedRun]) -> list[list[Any]]:
    """Return the rows of the table of targets: name, bar, value, and whether the value meets the bar."""
    return [
        [check["name"], f"at least {check['bar']:g}", f"{check['value']:.2f}", "yes" if check["met"] else "**no**"]
        for check in checks(runs)
    ]


def report(
    runs: Sequence[SeedRun], seconds: Mapping[str, float], memory: Mapping[str, int], picture: str = "persona.png"
) -> str:
    """Return the results as a Markdown page.

    Args:
        runs: the runs of all seeds, measured.
        seconds: the seconds of each stage.
        memory: the memory of each stage, in bytes.
        picture: the path of the picture, relative to the page.
    """
    study = runs[0].study
    parts = [
        "# Labels that are not ours: traits of a person",
        _what(runs),
        f"![Agreement of each expert with each trait, and the forecast of soups]({picture})",
        "## Targets",
        table(["target", "bar", "measured", "met"], check_rows(runs), words=1),
        "## Experts are not specific",
        "The share of each trait's test statements that are answered as a person *with* the trait answers them. An "
        "expert of an\nopposite should be low on its own trait. Its own trait is in bold. Over all experts, the mean "
        f"agreement with the wanted\nside of the own trait is {interval([single_agreement(run) for run in runs])}.",
        table(*expert_rows(runs), words=1),
        "## Soups of three experts",
        "Each row is the mean over all eight combinations of sides. The scale of `linear chosen` is one weight for "
        "all experts. The\nweights of `linear fitted` differ by expert and may be negative. All were chosen on "
        "validation statements.",
        table(*soup_rows(runs), words=2),
        "The fitted weights of the first group, with the first seed:",
        _weights_table(runs[0]),
        *_joint_part(runs),
        "## A forecast of what experts do to each other",
        _forecast_text(runs),
        "## Cost",
        table(
            ["stage", "minutes", "memory (GB)"],
            [[name, f"{value / 60:.1f}", f"{memory.get(name, 0) / 1e9:.1f}"] for name, value in seconds.items()],
            words=1,
        ),
        f"Data: [statements written by a model, with labels]({SOURCE}) (CC-BY-4.0). Base: {study.base}.",
    ]
    return "\n\n".join(parts) + "\n"


def draw(runs: Sequence[SeedRun], path: Path) -> Path:
    """Draw the experts' agreement and the forecasts as a PNG file, and return its path.

    Raises:
        UsageError: if matplotlib is missing.
    """
    points = [(point.forecast, point.measured) for point in forecast_points(runs)]
    return draw_forecast(
        expert_table(runs[0]),
        points,
        path,
        title="What experts of traits do to each other",
        note="share of test statements answered as a person with the trait; on the right, traits in linear soups",
    )


def _what(runs: Sequence[SeedRun]) -> str:
    study = runs[0].study
    probability = fsum(run.test().probability("base") for run in runs) / len(runs)
    return (
        f"The base is asked whether it would say a statement, and answers Yes or No. {len(study.traits)} traits have "
        f"two experts each: one\nanswers as a person with the trait, the other as a person with the opposite. Each "
        f"expert is trained on {study.num_train} statements\nof its trait and on {study.num_ties} statements of the "
        f"other traits, which hold it to the base's answers. {study.num_test} statements of each\ntrait are for the "
        "tables. No statement of training or validation is a paraphrase of a test statement of the same trait.\n\n"
        f"{len(runs)} seeds. Intervals are 95% t intervals over seeds. An answer is the likelier one of Yes and No; "
        f"the base begins its\nanswers with one of the two with probability {probability:.2f}."
    )


def _weights_table(run: SeedRun) -> str:
    triple = run.study.triples[0]
    weights = {combination: run.soup(FITTED, combination).weights for combination in combinations(triple)}
    names = list(next(iter(weights.values())))
    rows = [[combination.name, *(f"{own[name]:+.2f}" for name in names)] for combination, own in weights.items()]
    return table(["wanted", *names], rows, words=1)


def _joint_part(runs: Sequence[SeedRun]) -> list[str]:
    rows = joint_rows(runs)
    if not rows:
        return []
    systems = list(rows[0][2])
    cells = [[name, f"{joint:.2f}", *(f"{soups[system]:.2f}" for system in systems)] for name, joint, soups in rows]
    return [
        "## Against an adapter that is trained on the whole combination",
        "An upper reference: one adapter for one combination, trained on the pairs of all three sides with three times "
        "the steps.",
        table(["combination", "own adapter", *systems], cells, words=1),
    ]


def _forecast_text(runs: Sequence[SeedRun]) -> str:
    points = forecast_points(runs)
    error = fsum(abs(point.forecast - point.measured) for point in points) / len(points)
    harmed = [point for point in points if point.measured < 0.5 <= point.alone]
    foreseen = [point for point in harmed if point.forecast < 0.5]
    alarms = [point for point in points if point.forecast < 0.5 <= point.alone]
    return (
        "The margin of a statement under a soup is forecast from the base and from each expert alone: the changes by "
        "the experts,\ntimes their weights, add up (`psoups doctor` with pairs). No soup is computed for a forecast. "
        f"Over {len(points)} traits of linear soups,\nthe forecast agreement differs from the measured agreement by "
        f"{error:.2f} on average. In {len(harmed)} cases the soup agrees with a\ntrait in less than half of the "
        f"statements although the trait's own expert agrees in more; the forecast names {len(foreseen)} of them\n"
        f"and {len(alarms) - len([point for point in alarms if point.measured < 0.5])} cases in which it does not "
        "happen."
    )
