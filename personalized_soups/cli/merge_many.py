"""`psoups merge-many`: the experts of a library, merged for every user of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="merge-many")(merge_many)


def merge_many(
    profiles: Annotated[Path, typer.Argument(help="JSON Lines file: one profile a line, each with its user.")],
    *,
    experts: Annotated[
        list[Path] | None, typer.Option(help="Folder of experts, or one expert; may be repeated.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder in which every user gets a folder.", show_default=False)
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="Merge method; overrides the profiles'. See psoups inspect --methods.")
    ] = None,
    density: Annotated[float | None, typer.Option(help="Share of entries that a sparsifying method keeps.")] = None,
    epsilon: Annotated[float | None, typer.Option(help="Half the width of della's keep-probabilities.")] = None,
    lambda_: Annotated[float | None, typer.Option("--lambda", help="Scale of what TIES' election leaves.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of a method that drops at random.")] = None,
    rank: Annotated[int | None, typer.Option(help="Truncate to at most this rank; the error is recorded.")] = None,
    energy: Annotated[
        float | None, typer.Option(help="Truncate each module to the least rank that keeps this share of its energy.")
    ] = None,
    target: Annotated[
        str, typer.Option("--for", help="peft, or vllm: one rank for all modules, nothing in patterns.")
    ] = "peft",
    device: Annotated[str, typer.Option(help="auto (the CPU), cpu or cuda.")] = "auto",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the experts' own if left out.")
    ] = None,
    into_base: Annotated[
        str | None, typer.Option(help="Fold each soup into this base model and write full models.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace users' folders that hold another soup.")
    ] = False,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge experts for every user of a file, in one pass over the experts; run it again to go on."""
    if not experts:
        raise UsageError("no experts are given", where="--experts", mend="give --experts FOLDER")
    if out is None:
        raise UsageError("no output is given", where="--out", mend="give --out FOLDER")
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.profiles import read_profiles
    from personalized_soups.merging.many import ManyPlans
    from personalized_soups.merging.many import merge_many as merge_all

    given = {"density": density, "epsilon": epsilon, "lambda": lambda_, "seed": seed}
    keywords: dict[str, Any] = {
        "method": method,
        "options": {name: value for name, value in given.items() if value is not None},
        "rank": rank,
        "energy": energy,
        "dtype": dtype,
        "target": target,
        "same_base": same_base,
    }
    library = ExpertLibrary.open(*experts)
    plans = ManyPlans(library, into_base=into_base is not None, **keywords)
    # every line is checked before the first user is merged: a slip in the last one would cost the whole night
    total = 0
    for profile in read_profiles(profiles):
        plans.plan(profile)
        total += 1
    if not total:
        raise UsageError(
            "the file holds no profile",
            where=str(profiles),
            mend='write one profile a line: {"user": "u1042", "weights": {"expert": 0.6}}',
        )
    with render.progress("merging", quiet=as_json) as bar:
        merged = merge_all(
            library,
            read_profiles(profiles),
            out,
            base=None if into_base is None else resolve_base(into_base),
            device=device,
            overwrite=overwrite,
            progress=lambda done: bar.update(done, total=total),
            **keywords,
        )
    if as_json:
        render.show_json({"folder": str(out), "users": total, "written": merged.written, "kept": merged.kept})
        return
    render.show_record({"folder": str(out), "users": total, "written": merged.written, "there already": merged.kept})
