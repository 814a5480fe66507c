"""`psoups quality`: repeat the quickstart with several seeds and both kinds of basis, for the documentation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import DeviceOption, RestartOption, WorkersOption
from personalized_soups.cli.study.workers import num_workers
from personalized_soups.errors import check_extra


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="quality")(quality)


def quality(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the runs. Interrupted runs in this folder are resumed.")] = Path(
        "quality"
    ),
    page: Annotated[Path, typer.Option(help="Markdown page to write.")] = Path("quality/quality.md"),
    seeds: Annotated[int, typer.Option(help="Number of runs for each kind of basis.", min=1)] = 3,
    workers: WorkersOption = 0,
    device: DeviceOption = "auto",
    overwrite: RestartOption = False,
) -> None:
    """Repeat the quickstart with several seeds, with a free and with a shared basis, and write a table of all runs."""
    check_extra("train", "trl", "datasets", "accelerate")

    from personalized_soups.studies.folder import write_text
    from personalized_soups.studies.quality import quality_page, run_quality

    count = num_workers(workers)
    runs = run_quality(
        out, num_seeds=seeds, num_workers=count, device=device, stage=render.progress, overwrite=overwrite
    )
    text = quality_page(runs)
    write_text(page, text)
    render.show_text(text)
    render.say(f"written to {page}")
