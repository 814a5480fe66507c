"""`psoups train`: train one expert, or a user model, on preference pairs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.options import BaseOption, DeviceOption, DimensionsOption, JsonOption, OnOption, SeedOption
from personalized_soups.cli.train.bar_progress import BarProgress
from personalized_soups.cli.train.methods import MethodOptions, RewardOptions, UserOptions
from personalized_soups.cli.train.trainings import training_of
from personalized_soups.errors import SoupError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="train")(train)


def train(
    side: Annotated[
        str | None,
        typer.Argument(
            help="The side that the pairs prefer, e.g. concise. Any name for sft, and for grpo with --reward. None for "
            "p-dpo."
        ),
    ] = None,
    *,
    base: BaseOption,
    on: OnOption = None,
    data: Annotated[
        Path,
        typer.Option(
            help="JSON Lines file of preference pairs in TRL's format. For --method sft: of prompts with completions. "
            "For --method grpo: file of prompts."
        ),
    ],
    out: Annotated[Path, typer.Option(help="New folder to write the expert to.")],
    method: Annotated[
        str,
        typer.Option(
            help="dpo trains the expert of a side on pairs, sft on completions, grpo on rewards of its own answers. "
            "reward trains a reward model. p-dpo trains soft tokens for each user, and one adapter."
        ),
    ] = "dpo",
    reward: Annotated[
        str | None,
        typer.Option(
            help="Rewards of grpo with their weights, e.g. concise=0.5,friendly=0.5. By default, the scorer of SIDE.",
            show_default=False,
        ),
    ] = None,
    reward_model: Annotated[
        list[str] | None,
        typer.Option(
            help="Reward model for a name in --reward, in place of a scorer. May be repeated.",
            metavar="NAME=FOLDER",
            show_default=False,
        ),
    ] = None,
    instruction: Annotated[
        str, typer.Option(help="Text before each prompt of grpo, such as the wanted preferences.", show_default=False)
    ] = "",
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

    With --method grpo, train it by RL on a weighted sum of scores, without pairs. With --method reward, train a reward
    model of the side. With --method p-dpo, train soft tokens for each user and one adapter for all users; the pairs
    name their "user".

    To use several processes: torchrun --nproc_per_node 2 -m personalized_soups train ..., or use accelerate.
    """
    with _reported_by_the_first_process(out, quiet=as_json) as progress:
        users = UserOptions(user_model, user_tokens, clusters, alpha)
        rewards = RewardOptions(reward, reward_model or [], instruction)
        chosen = MethodOptions(method, side, dimensions, on, users, rewards)
        chosen.check()
        options = {"data": data, "out": out, "device": device, "seed": seed, "resume": resume, "progress": progress}
        run = training_of(chosen, base, recipe, options)

        from personalized_soups.training.processes import is_first_process, together

        with together():
            run()
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
