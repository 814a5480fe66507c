"""`psoups doctor`: experts checked against one another and their base before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.merging.doctor.diagnosis import Diagnosis


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="doctor")(doctor)


def doctor(
    experts: Annotated[list[Path], typer.Argument(help="Experts, or folders of experts.")],
    *,
    base: Annotated[
        str | None, typer.Option(help="The base model, to check the experts against it.", show_default=False)
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Profile file whose weights shall be looked at, too.", show_default=False)
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="Mixing weights in place of a profile: a=0.6,b=0.6.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(help="Rows of each module in which signs are counted.", min=1)] = 64,
    same_base: Annotated[
        bool, typer.Option("--same-base", help="Take different base names or fingerprints for one base.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check experts before they are merged: exit 0 if they can be, 1 if something stops it."""
    declared = _profile(profile, weights)

    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.doctor.diagnose import diagnose

    library = ExpertLibrary.open(*experts)
    with render.progress("modules", quiet=as_json) as bar:
        found = diagnose(
            library,
            None if base is None else resolve_base(base),
            profile=declared,
            same_base=same_base,
            num_rows=rows,
            progress=lambda done, total: bar.update(done, total=total),
        )
    if as_json:
        render.show_json(found.as_json())
    else:
        _show(found)
    if found.has_errors:
        raise typer.Exit(1)


def _profile(path: Path | None, weights: str | None) -> Profile | None:
    if path is not None and weights is not None:
        raise UsageError(
            "a profile file and --weights are both given", where="--profile, --weights", mend="give one of the two"
        )
    from personalized_soups.declare.profile import Profile, load_profile

    if path is not None:
        return load_profile(path)
    return None if weights is None else Profile.from_option(weights)


def _show(found: Diagnosis) -> None:
    if found.experts:
        _show_experts(found)
    if found.pairs:
        columns = ["pair", "cosine", "inputs overlap", "outputs overlap", "opposite signs"]
        rows = [
            [f"{pair.one}, {pair.other}", pair.cosine, pair.inputs, pair.outputs, pair.opposed] for pair in found.pairs
        ]
        render.show_table(columns, rows, title=f"Pairs (signs by {found.rows_looked_at})")
    render.show_table(
        ["", "what", "where", "mend"],
        [[each.severity, each.what, each.where, each.mend] for each in found.findings],
    )


def _show_experts(found: Diagnosis) -> None:
    """Print a row for each expert; in what all of them are alike is said once, above."""
    rows: list[dict[str, render.Cell]] = [
        {
            "expert": one.name,
            "dimension": one.dimension,
            "rank": one.rank,
            "scaling": one.scaling,
            "modules": one.num_modules,
            "dtype": one.dtype,
            "|dW|": one.norm,
            "|dW|/|W|": one.relative,
            "weight": one.weight,
        }
        for one in found.experts
    ]
    empty = {name for name in ("|dW|/|W|", "weight") if all(row[name] is None for row in rows)}
    shared = [name for name in ("rank", "scaling", "modules", "dtype") if len({row[name] for row in rows}) == 1]
    alike = shared if len(rows) > 1 else []
    columns = [name for name in rows[0] if name not in empty and name not in alike]
    render.show_table(
        columns,
        [[row[name] for name in columns] for row in rows],
        title=f"All experts: {', '.join(f'{name} {rows[0][name]}' for name in alike)}" if alike else None,
    )
