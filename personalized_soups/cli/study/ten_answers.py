"""`psoups study ten-answers`: what ten answers of a user are worth, with the experts of a finished quickstart."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import BaseOption, DeviceOption, DimensionsOption, RestartOption
from personalized_soups.cli.study.quickstart_study import StudyOptions

if TYPE_CHECKING:
    from personalized_soups.studies.ten_answers.study import TenAnswersResults


def ten_answers(
    *,
    quickstart: Annotated[Path, typer.Option(help="Folder of a finished psoups quickstart.")],
    base: BaseOption = "smollm2",
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")] = Path(
        "ten-answers"
    ),
    full: Annotated[bool, typer.Option("--full", help="The quickstart was a full study.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the quickstart, if it was given.", show_default=False)
    ] = None,
    train_recipe: Annotated[
        Path | None, typer.Option(help="Training recipe of the quickstart, if it was given.", show_default=False)
    ] = None,
    dimensions: DimensionsOption = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts of the quickstart, if they were given.", show_default=False)
    ] = None,
    users: Annotated[int, typer.Option(help="Number of simulated users.", min=2)] = 20,
    seed: Annotated[int, typer.Option(help="Random seed. Give the seed of the quickstart.", min=0, max=4_000_000)] = 0,
    device: DeviceOption = "auto",
    overwrite: RestartOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Ask simulated users ten questions each, and compare their soups with those of their true weights."""
    options = StudyOptions(
        base, "free", recipe, train_recipe, dimensions, prompts, full=full, seed=seed, workers=1, device=device
    )
    from personalized_soups.studies.ten_answers.study import TenAnswersStudy, run_ten_answers, write_results

    study = TenAnswersStudy(options.study(), quickstart, num_users=users)
    results = run_ten_answers(study, out, stage=render.progress, overwrite=overwrite)
    written = write_results(results, out)
    if as_json:
        render.show_json(results)
        return
    rows: list[list[render.Cell]] = [[name, sum(values) / len(values)] for name, values in results["rewards"].items()]
    render.show_table(
        ["soup of", "mean true reward"], rows, title=f"{users} users, {results['num_answers']} answers each"
    )
    render.say(_gain(results))
    render.say(f"written to {written}")


def _gain(results: TenAnswersResults) -> str:
    if results["gain"] is None or results["gain_interval"] is None:
        return "the true weights gain nothing over the base, so no share of their gain can be given"
    low, high = results["gain_interval"]
    return f"gain of ten answers: {results['gain']:.2f} of the true weights' gain [{low:.2f}, {high:.2f}]"
