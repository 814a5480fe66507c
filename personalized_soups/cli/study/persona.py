"""`psoups study persona`: experts of traits, on statements with labels."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.options import BaseOption, DeviceOption, RestartOption
from personalized_soups.errors import check_extra


def persona(
    *,
    data: Annotated[
        Path, typer.Option(help="Folder with a file TRAIT.jsonl for each trait (github.com/anthropics/evals, persona).")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")] = Path(
        "persona"
    ),
    base: BaseOption = "smollm2",
    seeds: Annotated[int, typer.Option(help="Number of seeds, each with its own experts.", min=1, max=10)] = 1,
    page: Annotated[
        Path | None, typer.Option(help="Also write the report to this Markdown page.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the page's picture, if not the page's own.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    overwrite: RestartOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Train experts of traits on labelled statements, and measure how well soups answer as wanted on every trait."""
    check_extra("train", "trl", "datasets", "accelerate")
    check_extra("plot", "matplotlib")
    from personalized_soups.studies.costs import Costs
    from personalized_soups.studies.folder import StudyFolder, write_results
    from personalized_soups.studies.persona.page import check_rows, draw, report, soup_rows
    from personalized_soups.studies.persona.settings import PersonaStudy
    from personalized_soups.studies.persona.study import run_persona
    from personalized_soups.studies.persona.summary import results

    study = PersonaStudy(base=resolve_base(base), num_seeds=seeds, device=device)
    runs = run_persona(study, data, out, stage=render.progress, overwrite=overwrite)
    folder, costs, content = StudyFolder(out), Costs(StudyFolder(out)), results(runs)
    reported = partial(report, runs, costs.seconds, costs.memory)
    write_results(folder, content, "persona", draw=partial(draw, runs), report=reported, page=page, images=images)
    if as_json:
        render.show_json(content)
        return
    render.show_table(*soup_rows(runs), title="Share of test statements that are answered as wanted")
    render.show_table(["target", "bar", "measured", "met"], check_rows(runs), title="targets")
    render.say(f"written to {folder.report}, {folder.results} and {folder.picture('persona')}")
