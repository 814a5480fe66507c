"""`psoups train`: preference pairs to one expert."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import MAX_SEED, catalogue_of, recipe_of, resolve_base
from personalized_soups.errors import SoupError

if TYPE_CHECKING:
    from personalized_soups.training.progress import StepReport


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="train")(train)


class BarProgress:
    """Shows one expert's training as a progress bar."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stack = ExitStack()
        self._bar: render.Bar | None = None

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Show the bar."""
        bar = render.progress(f"training {side}", num_steps, done=step, quiet=self._quiet)
        self._bar = self._stack.enter_context(bar)

    def advance(self, side: str, report: StepReport) -> None:
        """Move the bar on and show the step's figures."""
        if self._bar is not None:
            self._bar.update(report.step, loss=report.loss, margin=report.margin, accuracy=report.accuracy)

    def note(self, side: str, text: str) -> None:
        """Say it."""
        render.say(f"{side}: {text}")

    def end(self, side: str) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar, whatever became of the training."""
        self._stack.close()
        self._bar = None


def train(
    side: Annotated[str, typer.Argument(help="The side that the pairs favour, e.g. concise.")],
    *,
    base: Annotated[str, typer.Option(help="Base model: a folder, a hub id, or tiny: the embedded one.")],
    data: Annotated[Path, typer.Option(help="Preference pairs in TRL's format, JSON lines.")],
    out: Annotated[Path, typer.Option(help="New folder to write the expert to.")],
    recipe: Annotated[
        Path | None,
        typer.Option(help="Training recipe; by the base's size train/tiny.yaml or train/llama-7b.yaml if left out."),
    ] = None,
    dimensions: Annotated[
        Path | None, typer.Option(help="Your own preference catalogue; the shipped one if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of LoRA's start and of the order of the pairs.")] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last whole checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Train one expert: a LoRA adapter that moves a frozen base towards one side of a preference dimension.

    Works under torchrun and accelerate launch too: torchrun --nproc_per_node 2 -m personalized_soups train ...
    """
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.training import TrainingRecipe

    first = _is_first_process()
    progress = BarProgress(quiet=as_json or not first)
    try:
        catalogue = load(catalogue_of(base, dimensions), Catalogue)
        declared = load(recipe_of(base, recipe), TrainingRecipe)
        catalogue.side(side)  # before torch is imported

        from personalized_soups.training.expert import train_expert
        from personalized_soups.training.processes import together

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
    except SoupError as error:
        if first or error.exit_code == 1:
            raise
        raise typer.Exit(error.exit_code) from error  # every process met it; the first one says so
    except KeyboardInterrupt:
        if first:
            progress.close()
            _say_how_to_go_on(out)
        raise
    finally:
        progress.close()
    if first:
        _show(out, as_json=as_json)


def _say_how_to_go_on(out: Path) -> None:
    from personalized_soups.training.checkpoints import last_complete, partial_folder

    last = last_complete(partial_folder(out))
    if last is not None:
        render.say(f"{last.name} is kept: --resume goes on from it")


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


def _is_first_process() -> bool:
    from personalized_soups.training.processes import is_first_process

    return is_first_process()
