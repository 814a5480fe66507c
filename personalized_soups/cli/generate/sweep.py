"""`psoups sweep`: score answers while the weight moves from one expert to another."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import LoadOptions, checked_dtype
from personalized_soups.cli.generate.outputs import check_no_input
from personalized_soups.cli.generate.sweep_run import SweepRun, scoring_catalogue, two_experts
from personalized_soups.cli.options import (
    BaseOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    ExpertsOption,
    JsonOption,
    MaxNewTokensOption,
    OnOption,
    PromptsOption,
    RestartOption,
    SameBaseOption,
    SeedOption,
    TemperatureOption,
)
from personalized_soups.cli.sampling import SamplingOptions, check_temperature
from personalized_soups.errors import UsageError, check_extra

# With fewer prompts, the confidence intervals are as wide as the curve is high.
_FEW_PROMPTS = 16


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="sweep")(sweep)


def sweep(
    side_a: Annotated[str, typer.Argument(help="The expert with the whole weight at the first step.")],
    side_b: Annotated[str, typer.Argument(help="The expert with the whole weight at the last step.")],
    *,
    base: BaseOption,
    on: OnOption = None,
    experts: ExpertsOption,
    prompts: PromptsOption,
    out: Annotated[Path, typer.Option(help="Folder for answers.jsonl, sweep.json and sweep.png.")],
    steps: Annotated[int, typer.Option(min=2, help="Number of steps, including both ends.")] = 11,
    scale: Annotated[float, typer.Option(help="Sum of the two weights at every step.")] = 1.0,
    dimensions: DimensionsOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    batch_size: Annotated[
        int, typer.Option(min=1, help="Answers generated at once: the steps of one or more prompts.")
    ] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    same_base: SameBaseOption = False,
    overwrite: RestartOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer prompts while the weight moves from one expert to another, score the answers, and draw the curve.

    The catalogue's scorer for the side of the second expert scores the answers. If the shipped catalogue has no scorer
    for this side, the score of an answer is its number of words. Run the same command again to resume an interrupted
    run.
    """
    check_temperature(temperature)
    check_extra("plot", "matplotlib")
    loading = LoadOptions(base, device, checked_dtype(dtype), same_base, on)
    sampling = SamplingOptions(max_new_tokens, temperature, seed, batch_size)
    _check_sweep(side_a, side_b, scale)
    check_no_input(out / "answers.jsonl", [prompts])
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.studies.sweep import Sweep

    library = two_experts(ExpertLibrary.open(*experts), (side_a, side_b))
    side = library[side_b].side or side_b
    catalogue = scoring_catalogue(side, base, dimensions)
    swept = Sweep(side_a, side_b, steps, scale)
    run = SweepRun(swept, library, side, catalogue, prompts, out, loading, sampling)
    results = run.results(overwrite=overwrite, quiet=as_json)
    if as_json:
        render.show_json(results)
    else:
        _show(results, out)


def _check_sweep(side_a: str, side_b: str, scale: float) -> None:
    if side_a == side_b:
        raise UsageError(
            f"SIDE_A and SIDE_B are both {side_a!r}, but a sweep needs two different experts",
            where="SIDE_A SIDE_B",
            mend="name two different experts, e.g. psoups sweep unfriendly friendly ...",
        )
    if not 0 < scale < math.inf:
        raise UsageError(
            f"the scale is {scale:g}, but it must be a finite number above 0",
            where="--scale",
            mend="give a number above 0, e.g. --scale 1",
        )


def _show(results: Mapping[str, Any], folder: Path) -> None:
    from personalized_soups.studies.sweep import PICTURE

    rows = [
        [share, score, low, high, valid]
        for (share, score), (low, high), valid in zip(
            results["points"], results["intervals"], results["valid"], strict=True
        )
    ]
    title = f"{results['score']}: {results['low']} to {results['high']}, the base alone {results['base']:.3g}"
    render.show_table(["w", results["score"], "95% from", "to", "valid"], rows, title=title)
    if min(results["valid"]) < 1:
        render.say("an answer that the catalogue's scorer finds ill-formed or off topic is invalid and scores 0")
    if results["num_prompts"] < _FEW_PROMPTS:
        render.say(f"{results['num_prompts']} prompts are too few for a reliable curve: use {_FEW_PROMPTS} or more")
    render.say(f"{results['verdict']}; {folder / PICTURE}")
