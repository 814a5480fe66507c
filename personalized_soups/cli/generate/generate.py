"""`psoups generate`: prompts answered by a base, an adapter, a soup, or a soup for every user."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, NamedTuple, get_args

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
    profiles: Annotated[
        Path | None, typer.Option(help="JSON Lines of profiles, with --experts and --prompts: answer for every user.")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(help='Prompts for --profiles: one a line, or .jsonl with a "prompt" and perhaps its "user".'),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSON Lines file for the answers to --prompts; standard output if left out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Answers at once, with --profiles.")] = 64,
    allow_opposed: Annotated[
        bool, typer.Option("--allow-opposed", help="Take --weights on two sides of one dimension.")
    ] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The answer is cut there.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="Of the sampling; 0 is --greedy.")] = 0.7,
    greedy: Annotated[bool, typer.Option("--greedy", help="Take the likeliest token at each step.")] = False,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto for the base's own.")] = "auto",
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin --out anew where it is there.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object, not a stream.")] = False,
) -> None:
    """Answer a prompt with a base, with an adapter, or with a soup merged for the occasion.

    With --profiles and --prompts: answer every prompt for every user (or for the one that a line names), each with a
    soup of its own in mixed batches; nothing is merged. Run it again to go on with an interrupted --out.
    """
    check_temperature(temperature)
    held = check_dtype(dtype)
    if profiles is not None or prompts is not None:
        one_user: dict[str, object] = {
            "PROMPT": prompt,
            "--adapter": adapter,
            "--profile": profile,
            "--weights": weights,
        }
        one_user["--json"] = as_json or None  # they are JSON lines as it is
        checked = _checked_many(profiles, prompts, experts, one_user)
        from personalized_soups.cli.generate.generate_many import ManyOptions, generate_many

        generate_many(
            ManyOptions(
                base=base,
                experts=checked.experts,
                profiles=checked.profiles,
                prompts=checked.prompts,
                out=out,
                max_new_tokens=max_new_tokens,
                temperature=0.0 if greedy else temperature,
                batch_size=batch_size,
                seed=seed,
                device=device,
                dtype=held,
                same_base=same_base,
                overwrite=overwrite,
            )
        )
        return
    if out is not None:
        raise UsageError("--out is for the answers to --prompts", where="--out", mend="add --profiles and --prompts")
    _check_sources(adapter, experts, profile, weights)
    asked = _prompt(prompt)

    fields = {"allow_opposed": True} if allow_opposed else {}
    with _adapter_of(adapter, experts, profile, weights, fields, same_base=same_base) as folder:
        from personalized_soups.generation.generator import Generator

        generator = Generator.open(resolve_base(base), folder, device=device, dtype=held, same_base=same_base)
    pieces = generator.stream(asked, temperature=temperature, max_new_tokens=max_new_tokens, seed=seed, greedy=greedy)
    if as_json:
        render.show_json({"prompt": asked, "answer": "".join(pieces), "seed": seed})
        return
    for piece in pieces:
        render.show_text(piece, end="")
    render.show_text("")


class _Many(NamedTuple):
    experts: list[Path]
    profiles: Path
    prompts: Path


def _checked_many(
    profiles: Path | None, prompts: Path | None, experts: list[Path] | None, one_user: Mapping[str, object]
) -> _Many:
    """Return what many users' answers need, all of it given and nothing of one user's.

    Raises:
        UsageError: naming what is missing, or out of place.
    """
    out_of_place = [option for option, value in one_user.items() if value is not None]
    if out_of_place:
        raise UsageError(
            "one user's and many users' options are given",
            where=", ".join(out_of_place),
            mend="leave them out with --profiles and --prompts",
        )
    if profiles is None or prompts is None or not experts:
        missing = {"--profiles FILE": profiles, "--prompts FILE": prompts, "--experts FOLDER": experts}
        lacking = [option for option, value in missing.items() if not value]
        raise UsageError(
            "many users' answers need profiles, prompts and experts",
            where=", ".join(option.split()[0] for option in lacking),
            mend=f"add {' '.join(lacking)}",
        )
    return _Many(experts, profiles, prompts)


def check_temperature(temperature: float) -> None:
    """Raise if a temperature is infinite.

    Raises:
        UsageError: naming the option.
    """
    if math.isinf(temperature):
        raise UsageError("the temperature is infinite", where="--temperature", mend="give a number such as 0.7")


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
    fields: Mapping[str, bool],
    *,
    same_base: bool,
) -> Iterator[Path | None]:
    """Yield the adapter folder to load: the one given, a soup written for the occasion, or none."""
    if not experts:
        yield adapter
        return
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.profile import Profile, load_profile
    from personalized_soups.merging.writing.adapter import merge

    declared = load_profile(profile) if profile is not None else Profile.from_option(weights or "", **fields)
    merged = merge(ExpertLibrary.open(*experts), declared, same_base=same_base)
    with TemporaryDirectory(prefix="psoups-") as scratch:
        yield merged.write(Path(scratch) / "soup")
