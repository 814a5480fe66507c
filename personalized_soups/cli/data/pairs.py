"""`psoups pairs`: sample answers from a base, and pair better and worse answers for one side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from personalized_soups.cli.bases import LoadOptions, catalogue_of, checked_dtype
from personalized_soups.cli.data.fluent import bounds_of, fluent_answers
from personalized_soups.cli.data.outputs import check_new_file
from personalized_soups.cli.data.pair_limits import MaxPairsOption, MinGapOption, check_min_gap
from personalized_soups.cli.data.pair_table import show_pairs
from personalized_soups.cli.data.pool import PoolRequest, check_instructed
from personalized_soups.cli.options import (
    BaseOption,
    BatchSizeOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    OnOption,
    SeedOption,
    TemperatureOption,
)
from personalized_soups.cli.sampling import SamplingOptions, check_temperature
from personalized_soups.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="pairs")(pairs)


def pairs(
    side: Annotated[str, typer.Argument(help="The side that the pairs prefer, e.g. concise.")],
    *,
    base: BaseOption,
    on: OnOption = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help='File of prompts: one prompt per line, or JSON Lines with the key "prompt". Optional if --pool exists.'
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="JSON Lines file of pairs to write.")],
    dimensions: DimensionsOption = None,
    pool: Annotated[
        Path | None,
        typer.Option(
            help="File of sampled answers, for pairs of every side. The file is read if it exists, else written."
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Number of answers to each prompt.")] = 4,
    instructed: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many of the answers to a prompt are sampled under a side's instruction. With --pool, all sides "
            "of the catalogue take turns. Without it, the sides of the dimension take turns.",
        ),
    ] = 0,
    min_gap: MinGapOption = 0.3,
    max_pairs: MaxPairsOption = None,
    match_length: Annotated[
        bool,
        typer.Option(
            "--match-length",
            help="Choose pairs whose two answers are equally long on average, unless the side is about length.",
        ),
    ] = False,
    whole_sentences: Annotated[
        bool, typer.Option("--whole-sentences", help="Remove a cut-off last sentence from the answers of the pairs.")
    ] = False,
    fluency: Annotated[
        Path | None,
        typer.Option(help="Bounds of fluency from psoups scorer calibrate. Answers beyond them are left out."),
    ] = None,
    temperature: TemperatureOption = 1.0,
    max_new_tokens: MaxNewTokensOption = 256,
    batch_size: BatchSizeOption = 64,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    seed: SeedOption = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing --out.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Sample answers from a base model, and write pairs of a better and a worse answer for one side.

    psoups train reads the pairs. Sampled answers are kept, so run the same command again to resume an interrupted run.
    """
    _check_numbers(min_gap, instructed, num_samples, temperature)
    _check_files(prompts, pool, out, overwrite=overwrite)
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load

    loading = LoadOptions(base, device, checked_dtype(dtype), on=on)
    sampling = SamplingOptions(max_new_tokens, temperature, seed, batch_size)
    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    catalogue.scorer_of(side)  # raises an error before torch is imported
    bounds = bounds_of(fluency)

    from personalized_soups.training.data import write_pairs
    from personalized_soups.training.instructions import InstructedShare, instructions_of
    from personalized_soups.training.pairs import label_pool

    share = InstructedShare(instructed, instructions_of(catalogue, None if pool else side))
    journal = _journal_of(pool or out)
    answers = PoolRequest(prompts, pool, journal, num_samples, share, loading, sampling).answers(quiet=as_json)
    fluent = answers if bounds is None else fluent_answers(answers, bounds, loading, quiet=as_json)
    limits: dict[str, Any] = {"min_gap": min_gap, "max_pairs": max_pairs, "seed": seed}
    chosen: dict[str, Any] = {"match_length": match_length, "whole_sentences": whole_sentences}
    labelled = label_pool(fluent, side, catalogue, conversational=_has_chat_template(loading), **limits, **chosen)
    write_pairs(out, labelled)
    journal.unlink(missing_ok=True)
    show_pairs(labelled, {}, side=side, out=out, num_prompts=len(answers), as_json=as_json)


def _check_numbers(min_gap: float, instructed: int, num_samples: int, temperature: float) -> None:
    check_temperature(temperature, usual=1.0)
    check_min_gap(min_gap)
    check_instructed(instructed, num_samples)


def _check_files(prompts: Path | None, pool: Path | None, out: Path, *, overwrite: bool) -> None:
    has_pool = pool is not None and pool.exists()
    if prompts is None and not has_pool:
        raise UsageError(
            "neither --prompts nor an existing --pool is given",
            where="--prompts",
            mend="give a file of prompts, e.g. --prompts questions.txt",
        )
    check_new_file(out, overwrite=overwrite)
    if pool is not None and not has_pool:
        check_new_file(pool, overwrite=False)


def _journal_of(file: Path) -> Path:
    """Return the path of the hidden file that stores sampled answers until `file` is written."""
    return file.with_name(f".{file.name}.sampling")


def _has_chat_template(loading: LoadOptions) -> bool:
    from personalized_soups.generation.loading import load_tokenizer

    return load_tokenizer(loading.path).chat_template is not None
