"""`psoups generate`: answer prompts with a base, an adapter or a soup, for one user or for many users."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli.bases import LoadOptions, checked_dtype
from personalized_soups.cli.generate.many_users import answer_many_users, checked_many_users
from personalized_soups.cli.generate.one_user import OneUserRequest, answer_one_user
from personalized_soups.cli.options import (
    AllowOpposedOption,
    BaseOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    MaxNewTokensOption,
    OnOption,
    RestartOption,
    SameBaseOption,
    SeedOption,
    TemperatureOption,
)
from personalized_soups.cli.sampling import SamplingOptions, check_temperature
from personalized_soups.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="generate")(generate)


def generate(
    prompt: Annotated[
        str | None, typer.Argument(help='The prompt. If it is "-" or missing, standard input is read.')
    ] = None,
    *,
    base: BaseOption,
    on: OnOption = None,
    adapter: Annotated[Path | None, typer.Option(help="Folder of an adapter: an expert or a merged adapter.")] = None,
    experts: Annotated[
        list[Path] | None, typer.Option(help="Folder of experts to merge for this answer. May be repeated.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile file with the weights of the experts.")] = None,
    weights: Annotated[str | None, typer.Option(help="Mixing weights instead of a profile, e.g. a=0.6,b=0.6.")] = None,
    profiles: Annotated[
        Path | None,
        typer.Option(help="JSON Lines file of the profiles of many users. Requires --prompts and --experts."),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts for --profiles: one per line, or JSON Lines with "prompt" and, optionally, "user".'
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="JSON Lines file for the answers to --prompts. Without --out, the answers are printed."),
    ] = None,
    user_model: Annotated[
        Path | None, typer.Option(help="Folder of a user model, which psoups train --method p-dpo has written.")
    ] = None,
    user: Annotated[
        str | None,
        typer.Option(
            help="User of the user model who asks the prompt. Unknown users are answered as the generic user."
        ),
    ] = None,
    batch_size: BatchSizeOption = 64,
    allow_opposed: AllowOpposedOption = False,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always choose the likeliest token.")] = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    same_base: SameBaseOption = False,
    overwrite: RestartOption = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of streaming the answer.")
    ] = False,
) -> None:
    """Answer a prompt with a base model, an adapter, or a soup (the weighted sum of experts).

    With --profiles and --prompts, answer every prompt for every user. If the line of a prompt names a user, answer the
    prompt for this user only. One batch contains answers for several users, each with the user's own soup, and no
    merged model is written. Run the same command again to resume an interrupted --out.

    With --user-model, the soft tokens of --user come before the prompt. With --prompts, each line's user is answered.
    """
    check_temperature(temperature)
    loading = LoadOptions(base, device, checked_dtype(dtype), same_base, on)
    one_user = OneUserRequest(prompt, adapter, experts, profile, weights, allow_opposed, user_model, user)
    if profiles is None and prompts is None:
        if out is not None:
            raise UsageError(
                "--out is given without --profiles and --prompts, but only answers to many users are written to a file",
                where="--out",
                mend="remove --out, or add --profiles users.jsonl --prompts questions.txt",
            )
        sampling = SamplingOptions(max_new_tokens, temperature, seed, batch_size=1)
        answer_one_user(one_user, loading, sampling, greedy=greedy, as_json=as_json)
        return
    # Answers to many users are always JSON Lines, so --json is rejected.
    if misplaced := [*one_user.given, *(["--json"] if as_json else [])]:
        raise UsageError(
            "options for one user and for many users are both given",
            where=", ".join(misplaced),
            mend=f"remove {', '.join(misplaced)}, or remove --profiles and --prompts",
        )
    request = checked_many_users(experts, profiles, prompts, out, user_model, overwrite=overwrite)
    answer_many_users(
        request, loading, SamplingOptions(max_new_tokens, 0.0 if greedy else temperature, seed, batch_size)
    )
