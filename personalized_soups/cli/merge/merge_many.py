"""`psoups merge-many`: the experts of a library, merged for every user of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.merge.options import (
    AsJson,
    Base,
    Density,
    Device,
    Dtype,
    Energy,
    Epsilon,
    Experts,
    Lambda,
    MethodName,
    Rank,
    SameBase,
    Seed,
    Target,
    check_one_base,
    checked_experts,
    given_options,
)
from personalized_soups.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="merge-many")(merge_many)


def merge_many(
    profiles: Annotated[Path, typer.Argument(help="JSON Lines file: one profile a line, each with its user.")],
    *,
    experts: Experts = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder in which every user gets a folder.", show_default=False)
    ] = None,
    method: MethodName = None,
    density: Density = None,
    epsilon: Epsilon = None,
    lambda_: Lambda = None,
    seed: Seed = None,
    rank: Rank = None,
    energy: Energy = None,
    target: Target = "peft",
    device: Device = "auto",
    dtype: Dtype = None,
    base: Base = None,
    into_base: Annotated[
        str | None, typer.Option(help="Fold each soup into this base model and write full models.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace users' folders that hold another soup.")
    ] = False,
    same_base: SameBase = False,
    as_json: AsJson = False,
) -> None:
    """Merge experts for every user of a file, in one pass over the experts; run it again to go on."""
    folders = checked_experts(experts)
    check_one_base(base, into_base)
    if not profiles.is_file():
        raise UsageError(
            "the profiles are read twice, first to check them all: this is no file that can be",
            where=str(profiles),
            mend="write them to a file" if profiles.exists() else "check the path",
        )
    if out is None:
        raise UsageError("no output is given", where="--out", mend="give --out FOLDER")
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.declare.profiles import each_once, read_profiles
    from personalized_soups.merging.writing.many import ManyPlans
    from personalized_soups.merging.writing.many import merge_many as merge_all

    keywords: dict[str, Any] = {
        "method": method,
        "options": given_options(density=density, epsilon=epsilon, lambda_=lambda_, seed=seed),
        "rank": rank,
        "energy": energy,
        "dtype": dtype,
        "target": target,
        "same_base": same_base,
        "base": None if base is None else resolve_base(base),
    }
    library = ExpertLibrary.open(*folders)
    plans = ManyPlans(library, into_base=into_base is not None, **keywords)
    # every line is checked before the first user is merged: a slip in the last one would cost the whole night
    total = 0
    for profile in each_once(read_profiles(profiles)):
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
            into_base=None if into_base is None else resolve_base(into_base),
            device=device,
            overwrite=overwrite,
            progress=lambda done: bar.update(done, total=total),
            **keywords,
        )
    if as_json:
        render.show_json({"folder": str(out), "users": total, "written": merged.written, "kept": merged.kept})
        return
    render.show_record({"folder": str(out), "users": total, "written": merged.written, "there already": merged.kept})
