"""`psoups study papi`: predict real people's preferences from a few answers."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import RestartOption
from personalized_soups.errors import check_extra


def papi(
    *,
    data: Annotated[
        Path,
        typer.Option(
            help="Folder with papi_200.jsonl, papi_items.csv and papi_split.json (github.com/zhu-minjun/PAlign)."
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")] = Path(
        "papi"
    ),
    seeds: Annotated[int, typer.Option(help="Number of splits of the people.", min=1)] = 5,
    known: Annotated[int, typer.Option(help="Number of people to learn from. All others are new.", min=1)] = 130,
    rewards: Annotated[int, typer.Option(help="Number of base rewards to learn.", min=1, max=50)] = 5,
    questions: Annotated[int, typer.Option(help="Number of questions to each new person.", min=1, max=200)] = 20,
    page: Annotated[
        Path | None, typer.Option(help="Also write the report to this Markdown page.", show_default=False)
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Folder of the page's picture, if not the page's own.", show_default=False)
    ] = None,
    overwrite: RestartOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Learn base rewards from people's ratings, and predict how other people order statements after a few answers."""
    check_extra("plot", "matplotlib")
    from personalized_soups.studies.folder import StudyFolder, write_results
    from personalized_soups.studies.papi.page import check_rows, draw, report, summary, table_rows
    from personalized_soups.studies.papi.study import PapiStudy, run_papi

    study = PapiStudy(num_known=known, num_rewards=rewards, num_questions=questions, num_seeds=seeds)
    splits = run_papi(study, data, out, stage=render.progress, overwrite=overwrite)
    folder, results = StudyFolder(out), summary(study, splits)
    drawn, reported = partial(draw, splits), partial(report, study, splits)
    write_results(folder, results, "papi", draw=drawn, report=reported, page=page, images=images)
    if as_json:
        render.show_json(results)
        return
    head, rows = table_rows(splits)
    render.show_table(head, rows, title="Share of pairs of unseen statements in the right order")
    render.show_table(["target", "bar", "measured", "met"], check_rows(results["checks"]), title="targets")
    render.say(f"written to {folder.report}, {folder.results} and {folder.picture('papi')}")
