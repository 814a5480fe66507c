"""`psoups quickstart`: the whole pipeline on the embedded base, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import DeviceOption, RestartOption, WorkersOption
from personalized_soups.cli.study.quickstart_tables import next_steps, show_results
from personalized_soups.cli.study.workers import num_workers
from personalized_soups.errors import UsageError, check_extra

if TYPE_CHECKING:
    from personalized_soups.evaluation.results import Examples, Results

# The stages of the study derive larger seeds from this seed, and NumPy accepts seeds of 32 bits.
_MAX_SEED = 4_000_000


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="quickstart")(quickstart)


def quickstart(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run. An interrupted run in this folder is resumed.")] = Path(
        "quickstart"
    ),
    seed: Annotated[int, typer.Option(help="Random seed for prompts, answers and training.", min=0, max=_MAX_SEED)] = 0,
    basis: Annotated[
        str, typer.Option(help="free (ordinary LoRA), or shared (all experts share one frozen matrix A).")
    ] = "free",
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    overwrite: RestartOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print results.json.")] = False,
) -> None:
    """Train six experts on the embedded base, merge a model for each of eight combinations, and score all models."""
    if basis not in {"free", "shared"}:
        raise UsageError(f"unknown basis {basis!r}", where="--basis", mend="give --basis free, or give --basis shared")
    check_extra("train", "trl", "datasets", "accelerate")
    check_extra("plot", "matplotlib")
    from personalized_soups.studies.quickstart import run_study
    from personalized_soups.studies.study import Study

    kind: Literal["free", "shared"] = "shared" if basis == "shared" else "free"
    study = Study(seed=seed, basis=kind, num_workers=num_workers(workers), device=device)
    was_complete = (out / "results.json").is_file() and not overwrite
    try:
        results, examples = run_study(study, out, stage=render.progress, overwrite=overwrite)
    except KeyboardInterrupt:
        render.say(f"finished stages are kept: psoups quickstart --out {out} resumes the run")
        raise
    _write_report(out, results, examples)
    if as_json:
        render.show_json(results)
        return
    show_results(results, examples)
    if was_complete:
        render.say(f"\nThe run in {out} was already complete. Give --overwrite to start again.")
    render.say(next_steps(out, results))


def _write_report(out: Path, results: Results, examples: Examples) -> None:
    from personalized_soups.evaluation.pictures.curves import draw_sweeps
    from personalized_soups.evaluation.pictures.heat_map import draw_combinations
    from personalized_soups.evaluation.report import report
    from personalized_soups.studies.folder import StudyFolder, write_text

    folder = StudyFolder(out)
    draw_combinations(results, folder.picture("combinations"))
    draw_sweeps(results, folder.picture("sweeps"))
    write_text(folder.report, report(results, examples=examples))
