"""`psoups train`: train one expert, or a user model, on preference pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.options import BaseOption, DeviceOption, DimensionsOption, JsonOption, OnOption, SeedOption
from personalized_soups.cli.train.bar_progress import BarProgress
from personalized_soups.cli.train.methods import UserOptions, check_method, expert_declarations, user_recipe
from personalized_soups.errors import SoupError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="train")(train)


def train(
    side: Annotated[
        str | None, typer.Argument(help="The side that the pairs prefer, e.g. concise. None for --method p-dpo.")
    ] = None,
    *,
    base: BaseOption,
    on: OnOption = None,
    data: Annotated[Path, typer.Option(help="JSON Lines file of preference pairs in TRL's format.")],
    out: Annotated[Path, typer.Option(help="New folder to write the expert to.")],
    method: Annotated[
        str,
        typer.Option(help="dpo trains the expert of a side. p-dpo trains soft tokens for each user, and one adapter."),
    ] = "dpo",
    user_model: Annotated[
        str | None,
        typer.Option(help="Kind of user model for p-dpo: individual, cluster or uninformative.", show_default=False),
    ] = None,
    user_tokens: Annotated[
        int | None, typer.Option(min=1, help="Number of soft tokens of each user.", show_default=False)
    ] = None,
    clusters: Annotated[int | None, typer.Option(min=1, help="Number of clusters.", show_default=False)] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Weight of the user's own loss; the generic user's has 1 - alpha.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            help="Training recipe. By default, the shipped recipe of a named base, or of a base of this size."
        ),
    ] = None,
    dimensions: DimensionsOption = None,
    device: DeviceOption = "auto",
    seed: SeedOption = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last complete checkpoint.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train one expert: a LoRA adapter that moves a frozen base towards one side of a preference dimension.

    With --method p-dpo, train soft tokens for each user and one adapter for all users. The pairs name their "user".

    To use several processes: torchrun --nproc_per_node 2 -m personalized_soups train ..., or use accelerate.
    """
    with _reported_by_the_first_process(out, quiet=as_json) as progress:
        users = UserOptions(user_model, user_tokens, clusters, alpha)
        check_method(method, side, dimensions, users, on)
        options = {"data": data, "out": out, "device": device, "seed": seed, "resume": resume, "progress": progress}
        run: Callable[[], Path]
        if side is None:
            run = _user_model_training(base, recipe, users, options)
        else:
            run = _expert_training(side, base, recipe, dimensions, {**options, "on": on})

        from personalized_soups.training.processes import is_first_process, together

        with together():
            run()
    if is_first_process():
        _show(out, as_json=as_json)


def _expert_training(
    side: str, base: str, recipe: Path | None, dimensions: Path | None, options: dict[str, Any]
) -> Callable[[], Path]:
    catalogue, declared = expert_declarations(side, base, dimensions, recipe)

    from personalized_soups.training.expert import train_expert

    return partial(train_expert, side, base=resolve_base(base), recipe=declared, catalogue=catalogue, **options)


def _user_model_training(
    base: str, recipe: Path | None, users: UserOptions, options: dict[str, Any]
) -> Callable[[], Path]:
    declared = user_recipe(base, recipe, users)

    from personalized_soups.systems.p_rlhf.training import train_user_model

    return partial(train_user_model, base=resolve_base(base), recipe=declared, **options)


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
    users = record.recipe.get("users")
    named = {"expert": record.side, "dimension": record.dimension} if users is None else {"user model": users["model"]}
    render.show_record(
        {
            **named,
            **({} if record.on is None else {"on top of": f"{record.on.name} ({record.on.digest[:12]})"}),
            "folder": str(out),
            "pairs": record.data.num_pairs,
            "steps": int(record.metrics["num_steps"]),
            "loss": record.metrics["loss"],
            "margin": record.metrics["margin"],
            "accuracy": record.metrics["accuracy"],
        }
    )
