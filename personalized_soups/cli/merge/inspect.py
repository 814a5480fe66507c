"""`psoups inspect`: describe a folder of a model or of experts, or list the merge methods."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from personalized_soups.cli import render
from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.options import JsonOption
from personalized_soups.errors import UsageError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="inspect")(inspect)


def inspect(
    folder: Annotated[
        Path | None,
        typer.Argument(help="An expert, a soup, a base model (its folder, name or GGUF file), or a folder of experts."),
    ] = None,
    methods: Annotated[
        bool, typer.Option("--methods", help="List the merge methods instead of describing a folder.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Describe a folder: its kind, base, rank, modules, size, weights and provenance."""
    if methods == (folder is not None):
        raise UsageError(
            "exactly one of a folder and --methods must be given",
            where="FOLDER, --methods",
            mend="run psoups inspect my-soup, or run psoups inspect --methods",
        )
    if folder is None:
        _show_methods(as_json=as_json)
        return
    from personalized_soups.adapters.describe import describe

    description = describe(folder if folder.is_dir() else Path(resolve_base(str(folder))))
    if as_json:
        render.show_json(description.as_json())
        return
    render.show_record(description.facts, title=description.kind)
    if description.members:
        columns = list(description.members[0])
        render.show_table(columns, [[row.get(column) for column in columns] for row in description.members])


def _show_methods(*, as_json: bool) -> None:
    from personalized_soups.methods.options import OPTIONS
    from personalized_soups.methods.plugins import installed_methods, package_of
    from personalized_soups.methods.table import METHODS

    columns = ["method", "dW", "options", "encodings", "source", "about"]
    rows: list[list[render.Cell]] = [
        [row.name, row.formula, ", ".join(row.options), ", ".join(row.encodings), row.source, row.about]
        for row in METHODS.values()
    ]
    # The formula and options of a package's method are in its code, which is imported only to merge.
    rows += [
        [name, None, None, None, f"{package_of(entry_point)}, {entry_point.value}", "A method of an installed package."]
        for name, entry_point in installed_methods().items()
    ]
    if as_json:
        render.show_table(columns, rows, as_json=True)
        return
    render.show_table(["method", "dW", "options", "held", "about"], [[*row[:4], row[5]] for row in rows])
    options = [[f"--{option.name}", f"{option.default:g}", option.bounds, option.about] for option in OPTIONS.values()]
    render.show_table(["option", "default", "values", "about"], options)
