"""`psoups verify`: whether a merged folder is what its soup.json says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base

if TYPE_CHECKING:
    from personalized_soups.merging.verify.verification import Verification

_KIB = 10


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="verify")(verify)


def verify(
    folder: Annotated[Path, typer.Argument(help="A merged adapter or model: a folder with soup.json.")],
    *,
    experts: Annotated[
        list[Path] | None,
        typer.Option(help="Where the experts are now, if they have moved; may be repeated.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Where the base model is now, if it has moved.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto (the CPU), cpu or cuda.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Merge again from soup.json and compare: exit 0 if the folder is what it claims to be, 1 if not."""
    from personalized_soups.merging.verify.folder import verify as verified

    with render.progress("verifying KiB", quiet=as_json) as bar:
        found = verified(
            folder,
            base=None if base is None else resolve_base(base),
            experts=experts,
            device=device,
            progress=lambda done, total: bar.update(done >> _KIB, total=max(total >> _KIB, 1)),
        )
    if as_json:
        render.show_json(found.as_json())
    else:
        _show(found)
    if not found.is_sound:
        raise typer.Exit(1)


def _show(found: Verification) -> None:
    shown: dict[str, Any] = {
        "folder": found.folder,
        "kind": f"merged {found.kind}",
        "sound": found.is_sound,
        "tensors": f"{found.num_tensors}, {found.verdict}",
    }
    if found.num_rounded or found.num_different:
        shown["not identical"] = f"{found.num_rounded} by rounding alone, {found.num_different} different"
    render.show_record(shown)
    if found.differences:
        columns = ["tensor", "largest difference", "relative (Frobenius)", "rounding alone"]
        rows = [[each.name, each.largest, each.relative, each.is_rounding] for each in found.differences]
        render.show_table(columns, rows)
    if found.faults:
        rows = [[each.subject, each.where, each.what] for each in found.faults]
        render.show_table(["fault", "where", "what"], rows)
