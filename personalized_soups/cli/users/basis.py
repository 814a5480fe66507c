"""`psoups basis`: learn base rewards from the comparisons of many users, and look at them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import checked_dtype, resolve_base
from personalized_soups.cli.options import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OverwriteOption,
    SeedOption,
)
from personalized_soups.errors import UsageError, choose_from


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(no_args_is_help=True, help="Learn reward functions from the comparisons of many users.")
    group.command("train")(train_basis)
    group.command("show")(show_basis)
    app.add_typer(group, name="basis")


def train_basis(
    *,
    data: Annotated[
        Path,
        typer.Option(help="File of comparisons: JSON Lines with the keys user, prompt, a, b, and choice or label."),
    ],
    base: BaseOption,
    out: Annotated[Path, typer.Option(help="Folder of the basis to write.")],
    rank: Annotated[int, typer.Option(min=1, max=1024, help="Number of base rewards.")] = 5,
    kind: Annotated[
        str, typer.Option(help="Weights of users: pref (any numbers) or lore (at least 0, with the sum 1).")
    ] = "pref",
    pooling: Annotated[
        str, typer.Option(help="Hidden state of an answer: last (its end token) or mean (over its tokens).")
    ] = "last",
    batch_size: Annotated[int, typer.Option(min=1, help="Number of answers that are computed at once.")] = 64,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn base rewards that are linear in the base's hidden states, and the distribution of the users' weights.

    A line of the file is {"user": "ann", "prompt": "...", "a": "...", "b": "...", "choice": "a"}. The choice is a, b,
    tie or skip. A label, the probability that a is better, may replace it.
    """
    _check(kind, "--kind", ("pref", "lore"))
    _check(pooling, "--pooling", ("last", "mean"))
    checked = checked_dtype(dtype)
    from personalized_soups.files.atomic import check_target
    from personalized_soups.systems.basis.data import read_comparisons

    check_target(out, overwrite=overwrite)
    comparisons = read_comparisons(data)

    from personalized_soups.scoring.hidden_states import HiddenStates
    from personalized_soups.systems.basis.training import about_states, train_text_basis

    chosen: Any = {"pooling": pooling, "batch_size": batch_size}
    states = HiddenStates.open(resolve_base(base), device=device, dtype=checked, **chosen)
    settings: Any = {"kind": kind, "rank": rank, "seed": seed, "device": states.device}
    basis = train_text_basis(comparisons, states, about=about_states(states, base), **settings)
    basis.save(out, overwrite=overwrite)
    _show(out, as_json=as_json)


def show_basis(
    folder: Annotated[Path, typer.Argument(help="Folder of a basis, which psoups basis train wrote.")],
    *,
    as_json: JsonOption = False,
) -> None:
    """Describe a basis: its base rewards, how it was learned, and its digest."""
    _show(folder, as_json=as_json)


def _show(folder: Path, *, as_json: bool) -> None:
    from personalized_soups.systems.basis.basis import read_basis_record

    record = read_basis_record(folder)
    facts = {
        "folder": str(folder),
        "kind": record.kind,
        "base rewards": len(record.names),
        "users": record.num_users,
        "comparisons": record.num_comparisons,
        **{f"features: {name}": value for name, value in record.features.items()},
        "digest": record.digest,
    }
    render.show_record(facts, as_json=as_json)


def _check(value: str, option: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"unknown value {value!r}", where=option, mend=choose_from(value, known))
