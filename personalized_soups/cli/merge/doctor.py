"""`psoups doctor`: check experts against each other and against their base before merging them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.merge.interference import PairsRequest, interference_json, show_interference, weights_of
from personalized_soups.cli.options import DeviceOption, JsonOption, SameBaseOption, WeightsOption
from personalized_soups.errors import UsageError

if TYPE_CHECKING:
    from personalized_soups.declare.profile import Profile
    from personalized_soups.merging.doctor.diagnosis import Diagnosis
    from personalized_soups.training.interference import Interference


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="doctor")(doctor)


def doctor(
    experts: Annotated[list[Path], typer.Argument(help="Experts, or folders of experts.")],
    *,
    base: Annotated[
        str | None, typer.Option(help="Base model to check the experts against.", show_default=False)
    ] = None,
    profile: Annotated[
        Path | None, typer.Option(help="Profile file with weights to check as well.", show_default=False)
    ] = None,
    weights: WeightsOption = None,
    rows: Annotated[
        int, typer.Option(help="Number of rows of each module in which opposite signs are counted.", min=1)
    ] = 64,
    pairs: Annotated[
        list[str] | None,
        typer.Option(
            help="SIDE=FILE: preference pairs of a side, to forecast what the experts of a soup do to each other. "
            "May be repeated. Requires --base.",
            show_default=False,
        ),
    ] = None,
    num_pairs: Annotated[int, typer.Option(help="Number of pairs of each file to measure.", min=1)] = 64,
    on: Annotated[
        Path | None, typer.Option(help="Adapter on top of which the experts were trained.", show_default=False)
    ] = None,
    device: DeviceOption = "auto",
    same_base: SameBaseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check experts before merging them. Exit with 0 if they can be merged, with 1 if not.

    With --pairs, also forecast which sides a soup harms: the soup of --profile or --weights, else that of all sides
    with pairs, at weight 1.
    """
    declared = _profile(profile, weights)
    request = PairsRequest.of(pairs, base, num_pairs=num_pairs, on=on, device=device)
    diagnosis = _diagnosed(experts, base, declared, same_base=same_base, num_rows=rows, quiet=as_json)
    interference, mixed = None, {}
    if request is not None and not diagnosis.has_errors:
        interference = request.measure(experts, same_base=same_base, quiet=as_json)
        mixed = weights_of(declared, interference)
        diagnosis = replace(diagnosis, findings=(*interference.findings(mixed), *diagnosis.findings))
    if as_json:
        more = {} if interference is None else {"interference": interference_json(interference, mixed)}
        render.show_json({**diagnosis.as_json(), **more})
    else:
        _show(diagnosis, interference, mixed)
    if diagnosis.has_errors:
        raise typer.Exit(1)


def _diagnosed(
    experts: list[Path],
    base: str | None,
    profile: Profile | None,
    *,
    same_base: bool,
    num_rows: int,
    quiet: bool,
) -> Diagnosis:
    from personalized_soups.adapters.library import ExpertLibrary
    from personalized_soups.merging.doctor.diagnose import diagnose

    library = ExpertLibrary.open(*experts)
    with render.progress("modules", quiet=quiet) as bar:
        return diagnose(
            library,
            None if base is None else resolve_base(base),
            profile=profile,
            same_base=same_base,
            num_rows=num_rows,
            progress=lambda done, total: bar.update(done, total=total),
        )


def _profile(path: Path | None, weights: str | None) -> Profile | None:
    if path is not None and weights is not None:
        raise UsageError(
            "--profile and --weights are both given, but only one of the two can be used",
            where="--profile, --weights",
            mend="remove --profile, or remove --weights",
        )
    from personalized_soups.declare.profile import Profile, load_profile

    if path is not None:
        return load_profile(path)
    return None if weights is None else Profile.from_option(weights)


def _show(diagnosis: Diagnosis, interference: Interference | None, weights: Mapping[str, float]) -> None:
    if diagnosis.experts:
        _show_experts(diagnosis)
    if diagnosis.pairs:
        columns = ["pair", "cosine", "inputs overlap", "outputs overlap", "opposite signs"]
        rows = [
            [f"{pair.one}, {pair.other}", pair.cosine, pair.inputs, pair.outputs, pair.opposed]
            for pair in diagnosis.pairs
        ]
        render.show_table(columns, rows, title=f"Pairs (signs by {diagnosis.rows_looked_at})")
    if interference is not None:
        show_interference(interference, weights)
    render.show_table(
        ["", "what", "where", "mend"],
        [[finding.severity, finding.what, finding.where, finding.mend] for finding in diagnosis.findings],
    )


def _show_experts(diagnosis: Diagnosis) -> None:
    """Print a table with one row per expert. The title shows the values that all experts share."""
    rows: list[dict[str, render.Cell]] = [
        {
            "expert": expert.name,
            "dimension": expert.dimension,
            "rank": expert.rank,
            "scaling": expert.scaling,
            "modules": expert.num_modules,
            "dtype": expert.dtype,
            "|dW|": expert.norm,
            "|dW|/|W|": expert.relative,
            "weight": expert.weight,
        }
        for expert in diagnosis.experts
    ]
    empty = {name for name in ("|dW|/|W|", "weight") if all(row[name] is None for row in rows)}
    shared = [name for name in ("rank", "scaling", "modules", "dtype") if len({row[name] for row in rows}) == 1]
    shared = shared if len(rows) > 1 else []
    columns = [name for name in rows[0] if name not in empty and name not in shared]
    render.show_table(
        columns,
        [[row[name] for name in columns] for row in rows],
        title=f"All experts: {', '.join(f'{name} {rows[0][name]}' for name in shared)}" if shared else None,
    )
