"""`psoups verify`: check that a merged folder contains the soup that its soup.json describes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.options import JsonOption, MergeDeviceOption

if TYPE_CHECKING:
    from personalized_soups.merging.verify.verification import Verification

# The progress bar counts KiB: a shift of 10 bits.
_KIB = 10


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="verify")(verify)


def verify(
    folder: Annotated[Path, typer.Argument(help="A merged adapter or model: a folder with soup.json.")],
    *,
    experts: Annotated[
        list[Path] | None,
        typer.Option(help="New folder of the experts, if they were moved. May be repeated.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="New folder of the base model, if it was moved.", show_default=False)
    ] = None,
    on: Annotated[
        Path | None,
        typer.Option(help="New folder of the adapter below the experts, if it was moved.", show_default=False),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="Name of the merge method. Required if an installed package provides the method.",
            show_default=False,
        ),
    ] = None,
    device: MergeDeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Repeat the merge that soup.json describes, and compare. Exit with 0 if all tensors are the same, else with 1."""
    from personalized_soups.merging.verify.folder import verify as verified

    with render.progress("verifying KiB", quiet=as_json) as bar:
        verification = verified(
            folder,
            base=None if base is None else resolve_base(base),
            experts=experts,
            on=on,
            method=method,
            device=device,
            progress=lambda done, total: bar.update(done >> _KIB, total=max(total >> _KIB, 1)),
        )
    if as_json:
        render.show_json(verification.as_json())
    else:
        _show(verification)
    if not verification.is_sound:
        raise typer.Exit(1)


def _show(verification: Verification) -> None:
    shown: dict[str, Any] = {
        "folder": verification.folder,
        "kind": f"merged {verification.kind}",
        "sound": verification.is_sound,
        "tensors": f"{verification.num_tensors}, {verification.verdict}",
    }
    if verification.num_rounded or verification.num_different:
        shown["not identical"] = f"{verification.num_rounded} by rounding alone, {verification.num_different} different"
    render.show_record(shown)
    if verification.differences:
        columns = ["tensor", "largest difference", "relative (Frobenius)", "rounding alone"]
        rows = [
            [tensor.name, tensor.largest, tensor.relative, tensor.is_rounding] for tensor in verification.differences
        ]
        render.show_table(columns, rows)
    if verification.faults:
        rows = [[fault.subject, fault.where, fault.what] for fault in verification.faults]
        render.show_table(["fault", "where", "what"], rows)
