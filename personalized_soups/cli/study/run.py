"""`psoups run`: run the steps of a recipe in one folder, and again only what has changed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import DeviceOption, JsonOption, WorkersOption
from personalized_soups.cli.study.workers import num_workers

if TYPE_CHECKING:
    from personalized_soups.studies.pipeline.engine import FinishedStep
    from personalized_soups.studies.pipeline.run_folder import RunFolder
    from personalized_soups.studies.pipeline.steps import Step


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="run")(run)


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe of the run, e.g. recipes/runs/tiny.yaml.")],
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run. A rerun does only what is missing or has changed.")],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what a run would do, and what it took last time. Write nothing.")
    ] = False,
    seeds: Annotated[
        int | None,
        typer.Option(help="Number of seeds, in place of the recipe's `num_seeds`.", min=1, show_default=False),
    ] = None,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Run the steps of a recipe: sample, label, pair, train, merge, answer and report.

    The folder has the files of each step under steps/, and a manifest with the digests of what they were made from. A
    step runs again only if its settings or its inputs have changed. An interrupted run is resumed by the same command.
    """
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.run_recipe import RunRecipe

    declared = load(recipe, RunRecipe)
    if seeds is not None:
        declared = declared.replaced(num_seeds=seeds)

    from personalized_soups.studies.pipeline.expanding import steps_of
    from personalized_soups.studies.pipeline.run_folder import RunFolder

    steps, folder = steps_of(declared, device=device), RunFolder(out)
    if dry_run:
        show_plan(steps, folder, as_json=as_json)
    else:
        _show_run(finished_steps(steps, folder, num_workers(workers), quiet=as_json), out, as_json=as_json)
        for name in reports_of(steps):
            render.say(f"report: {folder.files(name) / 'report.html'}")


def reports_of(steps: list[Step]) -> list[str]:
    """Return the names of the steps that report."""
    from personalized_soups.studies.pipeline.reporting import ReportOn

    return [step.name for step in steps if isinstance(step.work, ReportOn)]


def show_plan(steps: list[Step], folder: RunFolder, *, as_json: bool) -> None:
    """Print what a run would do."""
    from personalized_soups.studies.pipeline.engine import plan

    planned = plan(steps, folder)
    rows = [[each.step.name, each.state, each.step.extent, each.seconds] for each in planned]
    render.show_table(["step", "would be", "work", "seconds last time"], rows, as_json=as_json)
    left = [each for each in planned if each.state != "done"]
    seconds = sum(each.seconds or 0 for each in left)
    render.say(f"{len(left)} of {len(planned)} steps would run, or might")
    if seconds:
        render.say(f"those of them that have run before took {seconds:.0f} s")


def finished_steps(steps: list[Step], folder: RunFolder, workers: int, *, quiet: bool) -> list[FinishedStep]:
    """Run the steps, and return them."""
    from personalized_soups.studies.pipeline.engine import run_steps
    from personalized_soups.studies.pipeline.steps import in_order

    finished: list[FinishedStep] = []
    with render.progress("running steps", len(in_order(steps)), quiet=quiet) as bar:

        def report(name: str, content: object) -> None:
            bar.update(len(finished), step=f"{name} {content}")

        for step in run_steps(steps, folder, workers=workers, on_report=report):
            finished.append(step)
            bar.update(len(finished))
    return finished


def _show_run(finished: list[FinishedStep], out: Path, *, as_json: bool) -> None:
    ran = [step for step in finished if step.was_run]
    seconds = sum(step.record.seconds for step in ran)
    record = {"folder": str(out), "steps": len(finished), "run": len(ran), "seconds": seconds}
    render.show_record(record, as_json=as_json)
