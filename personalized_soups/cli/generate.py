"""`psoups generate`: one prompt answered by a base, an adapter, or a soup."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, get_args

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import MAX_SEED, resolve_base
from personalized_soups.errors import InputError, UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.generation.loading import Dtype


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="generate")(generate)


def generate(
    prompt: Annotated[str | None, typer.Argument(help="The prompt; standard input if left out or -.")] = None,
    *,
    base: Annotated[str, typer.Option(help="Base model: a folder, a hub id, or tiny: the embedded one.")],
    adapter: Annotated[Path | None, typer.Option(help="Adapter folder: an expert or a merged adapter.")] = None,
    experts: Annotated[
        list[Path] | None, typer.Option(help="Folder of experts to merge for this answer; may be repeated.")
    ] = None,
    profile: Annotated[Path | None, typer.Option(help="Profile file, with --experts.")] = None,
    weights: Annotated[str | None, typer.Option(help="Mixing weights, with --experts: a=0.6,b=0.6.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer is cut there.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling; 0 is --greedy.")] = 0.7,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token at each step.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")] = "auto",
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a stream.")] = False,
) -> None:
    """Answer a prompt with a base, with an adapter, or with a soup merged for the occasion."""
    _check_sources(adapter, experts, profile, weights)
    if math.isinf(temperature):
        raise UsageError("the temperature is infinite", where="--temperature", mend="give a number such as 0.7")
    held = check_dtype(dtype)
    asked = _prompt(prompt)

    with _adapter_of(adapter, experts, profile, weights, same_base=same_base) as folder:
        from personalized_soups.generation.generator import Generator

        generator = Generator.open(resolve_base(base), folder, device=device, dtype=held, same_base=same_base)
    pieces = generator.stream(asked, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, greedy=greedy)
    if as_json:
        render.show_json({"prompt": asked, "answer": "".join(pieces), "seed": seed})
        return
    for piece in pieces:
        render.show_text(piece, end="")
    render.show_text("")


def check_dtype(dtype: str) -> Dtype:
    """Return the dtype that an option names.

    Raises:
        UsageError: if it names none.
    """
    from personalized_soups.generation.loading import Dtype

    known: tuple[Dtype, ...] = get_args(Dtype)
    for name in known:
        if name == dtype:
            return name
    raise UsageError(f"unknown dtype {dtype!r}", where="--dtype", mend=choose_from(dtype, known))


def _check_sources(adapter: Path | None, experts: list[Path] | None, profile: Path | None, weights: str | None) -> None:
    if adapter is not None and (experts or profile is not None or weights is not None):
        raise UsageError("an adapter and experts are given", where="--adapter, --experts", mend="give one of the two")
    if experts and (profile is None) == (weights is None):
        found = "neither is given" if profile is None else "both are given"
        raise UsageError(
            f"experts are merged for a profile or for --weights, exactly one: {found}",
            where="--profile, --weights",
            mend="add --profile FILE or --weights elementary=0.6,concise=0.6",
        )
    if not experts and (profile is not None or weights is not None):
        raise UsageError("no experts are given", where="--experts", mend="add --experts FOLDER")


def _prompt(prompt: str | None) -> str:
    from personalized_soups.generation.prompts import check_text

    where = "PROMPT"
    if prompt is None or prompt == "-":
        if prompt is None and sys.stdin.isatty():
            raise UsageError(
                "no prompt is given", where="PROMPT", mend='write it in quotes: psoups generate ... "How?"'
            )
        where = "standard input"
        try:
            prompt = sys.stdin.read()
        except UnicodeDecodeError as fault:
            raise InputError(
                f"the prompt is not UTF-8: byte {fault.object[fault.start]:#04x}",
                where=where,
                mend="send UTF-8 text, e.g. through: iconv -f latin1 -t utf-8",
            ) from fault
    check_text(prompt, where=where)
    return prompt.strip()


@contextmanager
def _adapter_of(
    adapter: Path | None,
    experts: list[Path] | None,
    profile: Path | None,
    weights: str | None,
    *,
    same_base: bool,
) -> Iterator[Path | None]:
    """Yield the adapter folder to load: the one given, a soup written for the occasion, or none."""
    if not experts:
        yield adapter
        return
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.profile import Profile, load_profile
    from personalized_soups.merging.adapter import merge

    declared = load_profile(profile) if profile is not None else Profile.from_option(weights or "")
    merged = merge(ExpertLibrary.open(*experts), declared, same_base=same_base)
    with TemporaryDirectory(prefix="psoups-") as scratch:
        yield merged.write(Path(scratch) / "soup")
