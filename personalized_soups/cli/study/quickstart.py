"""`psoups quickstart`: the whole pipeline on the embedded base or on a real one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import EMBEDDED
from personalized_soups.cli.options import BaseOption, DeviceOption, DimensionsOption, RestartOption, WorkersOption
from personalized_soups.cli.study.quickstart_study import StudyOptions
from personalized_soups.cli.study.quickstart_tables import next_steps, show_results
from personalized_soups.errors import check_extra

if TYPE_CHECKING:
    from personalized_soups.evaluation.results import Examples, Results
    from personalized_soups.studies.study import Study

# The stages of the study derive larger seeds from this seed, and NumPy accepts seeds of 32 bits.
_MAX_SEED = 4_000_000


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="quickstart")(quickstart)


def quickstart(
    *,
    base: BaseOption = EMBEDDED,
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")] = Path(
        "quickstart"
    ),
    full: Annotated[bool, typer.Option("--full", help="Run the full study of the base, which takes hours.")] = False,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe of the study (recipes/evaluation).", show_default=False)
    ] = None,
    train_recipe: Annotated[
        Path | None, typer.Option(help="Training recipe of the experts (recipes/train).", show_default=False)
    ] = None,
    dimensions: DimensionsOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts: JSON Lines with prompt, kind, subject and split (recipes/prompts).",
            show_default=False,
        ),
    ] = None,
    external: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=FILE",
            help="Evaluate all systems on prompts of this file, too. JSON Lines with prompt, or with self-instruct's "
            "instruction and instances. May be repeated, also after the run.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for prompts, answers and training.", min=0, max=_MAX_SEED)] = 0,
    basis: Annotated[
        str, typer.Option(help="free (ordinary LoRA), or shared (all experts share one frozen matrix A).")
    ] = "free",
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    overwrite: RestartOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Train six experts on a base, merge a model for each of eight combinations of sides, and score all models.

    Without options, the base is the embedded one, and the run takes minutes. With --base smollm2, it is a real model.
    A base without a name has the recipes and the prompts of smollm2.
    """
    check_extra("train", "trl", "datasets", "accelerate")
    check_extra("plot", "matplotlib")
    options = StudyOptions(
        base, basis, recipe, train_recipe, dimensions, prompts, full=full, seed=seed, workers=workers, device=device
    )
    was_complete = (out / "results.json").is_file() and not overwrite
    results, examples = _run(options.study(), base, out, external or [], overwrite=overwrite)
    _write_report(out, results, examples)
    if as_json:
        render.show_json(results)
        return
    show_results(results, examples)
    if was_complete and not external:
        render.say(f"\nThe run in {out} was already complete. Give --overwrite to start again.")
    render.say(next_steps(out, results, base))


def _run(study: Study, base: str, out: Path, external: list[str], *, overwrite: bool) -> tuple[Results, Examples]:
    from personalized_soups.studies.external import external_files
    from personalized_soups.studies.quickstart import run_study

    try:
        return run_study(study, out, stage=render.progress, overwrite=overwrite, external=external_files(external))
    except KeyboardInterrupt:
        render.say(f"finished stages are kept in {out}: the same command resumes the run")
        raise


def _write_report(out: Path, results: Results, examples: Examples) -> None:
    from personalized_soups.evaluation.pictures.curves import draw_sweeps
    from personalized_soups.evaluation.pictures.heat_map import draw_combinations
    from personalized_soups.evaluation.report import report
    from personalized_soups.studies.folder import StudyFolder, write_text

    folder = StudyFolder(out)
    draw_combinations(results, folder.picture("combinations"))
    if results["sweeps"]:
        draw_sweeps(results, folder.picture("sweeps"))
    write_text(folder.report, report(results, examples=examples))
