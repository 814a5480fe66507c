"""`psoups train`: train one expert on preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import catalogue_of, recipe_of, resolve_base
from personalized_soups.cli.options import BaseOption, DeviceOption, DimensionsOption, JsonOption, SeedOption
from personalized_soups.cli.train.bar_progress import BarProgress
from personalized_soups.errors import SoupError

if TYPE_CHECKING:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.training import TrainingRecipe


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="train")(train)


def train(
    side: Annotated[str, typer.Argument(help="The side that the pairs prefer, e.g. concise.")],
    *,
    base: BaseOption,
    data: Annotated[Path, typer.Option(help="JSON Lines file of preference pairs in TRL's format.")],
    out: Annotated[Path, typer.Option(help="New folder to write the expert to.")],
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Training recipe. By default, train/tiny.yaml for a small base and train/llama-7b.yaml for others."
        ),
    ] = None,
    dimensions: DimensionsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last complete checkpoint.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one expert: a LoRA adapter that moves a frozen base towards one side of a preference dimension.

    To use several processes: torchrun --nproc_per_node 2 -m personalized_soups train ..., or use accelerate.
    """
    with _reported_by_the_first_process(out, quiet=as_json) as progress:
        catalogue, declared = _declarations(side, base, dimensions, recipe)

        from personalized_soups.training.expert import train_expert
        from personalized_soups.training.processes import is_first_process, together

        with together():
            train_expert(
                side,
                base=resolve_base(base),
                data=data,
                out=out,
                recipe=declared,
                catalogue=catalogue,
                device=device,
                seed=seed,
                resume=resume,
                progress=progress,
            )
    if is_first_process():
        _show(out, as_json=as_json)


@contextmanager
def _reported_by_the_first_process(out: Path, *, quiet: bool) -> Iterator[BarProgress]:
    """Yield the progress bar. Only the first process reports errors in the input, which occur in every process.

    On Ctrl-C, the first process prints the name of the checkpoint that is kept.
    """
    from personalized_soups.training.processes import is_first_process

    first = is_first_process()
    progress = BarProgress(quiet=quiet or not first)
    try:
        yield progress
    except SoupError as error:
        if first or error.exit_code == 1:
            raise
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        if first:
            progress.close()
            _say_how_to_resume(out)
        raise
    finally:
        progress.close()


def _declarations(
    side: str, base: str, dimensions: Path | None, recipe: Path | None
) -> tuple[Catalogue, TrainingRecipe]:
    """Load and check the catalogue and the recipe. Errors in these files are raised before torch is imported."""
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.training import TrainingRecipe

    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    declared = load(recipe_of(base, recipe), TrainingRecipe)
    catalogue.side(side)
    return catalogue, declared


def _say_how_to_resume(out: Path) -> None:
    from personalized_soups.training.checkpoints import last_complete, partial_folder

    last = last_complete(partial_folder(out))
    if last is not None:
        render.say(f"the checkpoint {last.name} is kept: give --resume to continue from this checkpoint")


def _show(out: Path, *, as_json: bool) -> None:
    from personalized_soups.adapters.provenance import read_expert_record

    record = read_expert_record(out)
    assert record is not None
    if as_json:
        render.show_json({"folder": str(out), **record.model_dump(mode="json")})
        return
    assert record.data is not None
    render.show_record(
        {
            "expert": record.side,
            "dimension": record.dimension,
            "folder": str(out),
            "pairs": record.data.num_pairs,
            "steps": int(record.metrics["num_steps"]),
            "loss": record.metrics["loss"],
            "margin": record.metrics["margin"],
            "accuracy": record.metrics["accuracy"],
        }
    )
