"""`psoups tiny build`: build the embedded base model again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import JsonOption, OverwriteOption


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(help="The embedded tiny base model.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_tiny)
    group.command("build")(build)
    app.add_typer(group, name="tiny")


def _tiny() -> None:
    """The embedded tiny base model."""


def build(
    out: Annotated[Path, typer.Option(help="New folder to write.")] = Path("tiny-base"),
    steps: Annotated[
        int | None, typer.Option(help="Number of training steps, instead of the number for the shipped base.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed for the corpus and the initial weights.", min=0)] = 0,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Generate the corpus, train the tokenizer and the base model on it, and score the model (20 minutes on a core)."""
    from dataclasses import replace

    from personalized_soups.files.atomic import check_replaceable
    from personalized_soups.tiny.build import build as build_base
    from personalized_soups.tiny.pretraining import BaseRecipe

    check_replaceable(out.absolute(), overwrite=overwrite)  # after the training, an error would waste it
    recipe = replace(BaseRecipe(), seed=seed)
    recipe = recipe if steps is None else replace(recipe, steps=steps)
    with render.progress("training the base", recipe.steps, quiet=as_json) as bar:
        record = build_base(out, recipe, on_step=lambda step, loss: bar.update(step, loss=loss), overwrite=overwrite)
    shown = {key: record[key] for key in ("num_parameters", "last_loss", "scores", "corpus_sha256")}
    render.show_record({"folder": str(out), **shown}, as_json=as_json)
