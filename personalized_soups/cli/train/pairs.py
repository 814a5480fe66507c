"""`psoups pairs`: a base's own answers, labelled for one side."""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import MAX_SEED, catalogue_of, resolve_base
from personalized_soups.errors import OutputExistsError, UsageError

if TYPE_CHECKING:
    from personalized_soups.generation.loading import Dtype
    from personalized_soups.training.pairs import Sampled


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="pairs")(pairs)


def pairs(
    side: Annotated[str, typer.Argument(help="The side that the pairs shall favour, e.g. concise.")],
    *,
    base: Annotated[str, typer.Option(help="Base model: a folder, a hub id, or tiny: the embedded one.")],
    prompts: Annotated[
        Path | None,
        typer.Option(help='Prompts: one a line, or .jsonl with a "prompt" in each line. Not needed with a pool.'),
    ] = None,
    out: Annotated[Path, typer.Option(help="File of pairs to write, JSON lines.")],
    dimensions: Annotated[
        Path | None, typer.Option(help="Your own preference catalogue; the shipped one if left out.")
    ] = None,
    pool: Annotated[
        Path | None,
        typer.Option(help="File of sampled answers: read where it is there, else written; serves every side."),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Answers to each prompt.")] = 4,
    min_gap: Annotated[float, typer.Option(help="Least difference of score within a pair, in (0, 1].")] = 0.3,
    max_pairs: Annotated[int | None, typer.Option(min=1, help="Keep at most so many pairs.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Answers are cut there.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers sampled at once.")] = 64,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling and of the choice of pairs.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace --out where it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Sample answers from a base and pair those that differ for one side, as data for psoups train.

    Answers are kept as they come: the same command goes on with a sampling that was cut short.
    """
    if math.isinf(temperature):
        raise UsageError("the temperature is infinite", where="--temperature", mend="give a number such as 1.0")
    if not 0 < min_gap <= 1:
        raise UsageError(f"the least gap is {min_gap:g}", where="--min-gap", mend="give a number in (0, 1]")
    if prompts is None and (pool is None or not pool.exists()):
        raise UsageError(
            "no prompts are given", where="--prompts", mend="give --prompts FILE, or a --pool that is there"
        )
    _check_out(out, overwrite=overwrite)
    if pool is not None and not pool.exists():
        _check_out(pool, overwrite=False)
    from personalized_soups.cli.generate.generate import check_dtype
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load

    held = check_dtype(dtype)
    catalogue = load(catalogue_of(base, dimensions), Catalogue)
    catalogue.scorer_of(side)  # before torch is imported

    from personalized_soups.generation.loading import load_tokenizer
    from personalized_soups.training.data import write_pairs
    from personalized_soups.training.pairs import label_pool, read_pool, write_pool

    kept = _kept_beside(pool or out)
    if pool is not None and pool.exists():
        sampled = read_pool(pool)
        _check_prompts(prompts, sampled, pool)
    else:
        assert prompts is not None
        sampled = _sample(
            resolve_base(base),
            prompts,
            kept,
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            device=device,
            dtype=held,
            seed=seed,
            quiet=as_json,
        )
        if pool is not None:
            write_pool(pool, sampled)
            kept.unlink()
    labelled = label_pool(
        sampled,
        side,
        catalogue,
        min_gap=min_gap,
        max_pairs=max_pairs,
        seed=seed,
        conversational=load_tokenizer(resolve_base(base)).chat_template is not None,
    )
    write_pairs(out, labelled)
    kept.unlink(missing_ok=True)
    gaps = [pair["chosen_score"] - pair["rejected_score"] for pair in labelled]
    render.show_record(
        {
            "side": side,
            "file": str(out),
            "pairs": len(labelled),
            "prompts": len(sampled),
            "mean gap": sum(gaps) / len(gaps),
        },
        as_json=as_json,
    )


def _sample(
    base: str,
    prompts: Path,
    kept: Path,
    *,
    num_samples: int,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    device: str,
    dtype: Dtype,
    seed: int,
    quiet: bool,
) -> list[Sampled]:
    from personalized_soups.adapters.fingerprint import base_fingerprint
    from personalized_soups.generation.generator import Generator
    from personalized_soups.generation.prompts import read_asked_prompts
    from personalized_soups.training.resumable_sampling import sample_kept

    lines = read_asked_prompts(prompts)
    asked = [line.prompt for line in lines]
    generator = Generator.open(base, device=device, dtype=dtype)
    generator.check(lines)
    with ExitStack() as shown:
        bars: list[render.Bar] = []

        def begin(done: int) -> None:
            total = len(asked) * num_samples
            bars.append(shown.enter_context(render.progress("sampling answers", total, done=done, quiet=quiet)))

        def advance(done: int) -> None:
            bars[0].update(done)

        return sample_kept(
            generator,
            asked,
            kept=kept,
            base=base_fingerprint(base),
            num_samples=num_samples,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            seed=seed,
            on_begin=begin,
            on_done=advance,
        )


def _kept_beside(file: Path) -> Path:
    """Return where answers are kept until `file` is written: hidden, beside it."""
    return file.with_name(f".{file.name}.sampling")


def _check_prompts(prompts: Path | None, sampled: list[Sampled], pool: Path) -> None:
    from personalized_soups.generation.prompts import read_prompts

    if prompts is not None and read_prompts(prompts) != [each.prompt for each in sampled]:
        raise UsageError(
            f"the pool holds answers to other prompts than {prompts}",
            where=str(pool),
            mend="leave --prompts out to use the pool as it is, or name a new pool",
        )


def _check_out(out: Path, *, overwrite: bool) -> None:
    if out.is_dir():
        raise OutputExistsError("the output is a folder", where=str(out), mend="name a file, e.g. pairs.jsonl")
    if out.exists() and not overwrite:
        raise OutputExistsError(
            "the output file is there already", where=str(out), mend="choose another name, or pass --overwrite"
        )
    if not out.absolute().parent.is_dir():
        raise UsageError("the output's folder is not there", where=str(out.parent), mend="make it first")
