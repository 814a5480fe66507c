"""`psoups quality`: the quickstart over several seeds and both kinds of basis, as a page of the documentation."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.errors import check_extra


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="quality")(quality)


def quality(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the runs; interrupted ones in it go on.")] = Path("quality"),
    page: Annotated[Path, typer.Option(help="The Markdown page to write.")] = Path("quality/quality.md"),
    seeds: Annotated[int, typer.Option(help="Runs for each kind of basis.", min=1)] = 3,
    workers: Annotated[int, typer.Option(help="Worker processes; 0 takes one per core, at most 6.", min=0)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew where the folder holds runs.")] = False,
) -> None:
    """Repeat the quickstart for several seeds, with free and with shared basis, and write the table of all."""
    check_extra("train", "trl", "datasets", "accelerate")

    from personalized_soups.studies.folder import write_text
    from personalized_soups.studies.quality import quality_page, run_quality

    count = workers or min(6, len(os.sched_getaffinity(0)))
    found = run_quality(
        out, num_seeds=seeds, num_workers=count, device=device, stage=render.progress, overwrite=overwrite
    )
    text = quality_page(found)
    write_text(page, text)
    render.show_text(text)
    render.say(f"written to {page}")
