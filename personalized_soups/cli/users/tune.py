"""`psoups tune`: search the weights that fit a user's own data, without gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli.bases import LoadOptions, checked_dtype
from personalized_soups.cli.options import (
    AllowOpposedOption,
    BaseOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    ExpertsOption,
    JsonOption,
    MaxNewTokensOption,
    OnOption,
    SameBaseOption,
    SeedOption,
    ServedStoreOption,
    TemperatureOption,
)
from personalized_soups.cli.sampling import SamplingOptions, check_temperature
from personalized_soups.cli.users.tuning_run import Evidence, SearchOptions, TuningRun, checked_evidence
from personalized_soups.cli.users.tuning_target import TuningTarget
from personalized_soups.errors import check_extra

# Texts are read all tokens at once, which fills the processor. Answers grow by a token at a time, so more rows pay.
_TEXTS, _ANSWERS = 64, 256


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="tune")(tune)


def tune(
    user: Annotated[str, typer.Argument(help="The user's name in the store.", show_default=False)],
    *,
    base: BaseOption,
    on: OnOption = None,
    experts: ExpertsOption,
    examples: Annotated[
        Path | None,
        typer.Option(
            help='JSON Lines file of the user\'s texts, with the keys "prompt" and "text".', show_default=False
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            help="Instead of examples: a side or dimension of the catalogue, package.module:function, or an "
            "installed scorer.",
            show_default=False,
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="File of prompts whose answers the scorer rates: one per line, or JSON Lines.", show_default=False
        ),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(
            help="Weights to start from, e.g. a=0.6,b=0.6, or base. By default, the user's profile in the store, "
            "or base.",
            show_default=False,
        ),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Number of candidates to evaluate.")] = 100,
    population: Annotated[
        int | None,
        typer.Option(min=4, help="Candidates in a generation, which is one mixed batch.", show_default=False),
    ] = None,
    sigma: Annotated[float, typer.Option(help="Standard deviation of the first generation.")] = 0.5,
    limit: Annotated[float, typer.Option(help="Greatest magnitude of a weight.")] = 1.5,
    layer_groups: Annotated[
        int | None,
        typer.Option(min=1, help="Search separate weights for this many groups of layers.", show_default=False),
    ] = None,
    allow_opposed: AllowOpposedOption = False,
    profiles: ServedStoreOption = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Profile file to write; with --layer-groups, JSON weights.", show_default=False),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    dimensions: DimensionsOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Rows computed at once. By default 64 texts, or 256 answers.", show_default=False),
    ] = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    same_base: SameBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Search the weights that fit a user's own data, without gradients, and store them.

    The data are texts that the user wrote or accepted (--examples), or prompts whose answers a scorer rates (--scorer,
    --prompts). A third of the data is kept from the search. If no weights score higher than the start, on that third
    and on all data, nothing is written. The first Ctrl-C ends the search and keeps the best weights so far; a second
    one stops without writing anything.
    """
    check_temperature(temperature)
    check_extra("search", "cmaes")
    evidence: Evidence = checked_evidence(examples, scorer, prompts, dimensions)
    target = TuningTarget.checked(user, profiles, out, overwrite=overwrite, by_layer=layer_groups is not None)
    run = TuningRun(
        evidence,
        LoadOptions(base, device, checked_dtype(dtype), same_base, on),
        SamplingOptions(max_new_tokens, temperature, seed, batch_size or (_TEXTS if scorer is None else _ANSWERS)),
        SearchOptions(budget, population, sigma, limit, layer_groups, allow_opposed),
    )
    with target.opened(experts) as opened:
        begun = opened.start(start, allow_opposed=allow_opposed)
        tuning = run.tuned(opened.library, begun, quiet=as_json)
        opened.keep(tuning, as_json=as_json)
