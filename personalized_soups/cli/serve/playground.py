"""`psoups playground`: the page with sliders, for this machine alone."""

from __future__ import annotations

from typing import Annotated

import typer

from personalized_soups.cli.bases import EMBEDDED
from personalized_soups.cli.serve.serve import (
    PORT,
    Base,
    Device,
    Dimensions,
    Dtype,
    Experts,
    Profiles,
    SameBase,
    ServeOptions,
    serve_asked,
)


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="playground")(playground)


def playground(
    *,
    base: Base = EMBEDDED,
    experts: Experts,
    profiles: Profiles = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port; 8000 if left out, or a free one.")] = None,
    dimensions: Dimensions = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in your browser.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    same_base: SameBase = False,
) -> None:
    """Serve a page with a slider for each dimension, for this machine alone; base and mixture answer side by side.

    With --profiles, mixtures can be saved, and compared again.
    """
    asked = ServeOptions(
        base,
        experts,
        profiles=profiles,
        port=PORT if port is None else port,
        dimensions=dimensions,
        device=device,
        dtype=dtype,
        same_base=same_base,
        takes_any_port=port is None,
        opens_browser=open_browser,
    )
    serve_asked(asked)
