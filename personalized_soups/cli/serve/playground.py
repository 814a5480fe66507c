"""`psoups playground`: serve the page with sliders on this machine only."""

from __future__ import annotations

from typing import Annotated

import typer

from personalized_soups.cli.bases import EMBEDDED, LoadOptions, checked_dtype
from personalized_soups.cli.options import (
    BaseOption,
    DeviceOption,
    DimensionsOption,
    DtypeOption,
    ExpertsOption,
    OnOption,
    SameBaseOption,
    ServedQuestionsOption,
    ServedStoreOption,
)
from personalized_soups.cli.serve.server_run import HOST, PORT, ServedFiles, ServerRun, served_name, started_with
from personalized_soups.errors import check_extra
from personalized_soups.serving.web.settings import Rules, Settings


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command(name="playground")(playground)


def playground(
    *,
    base: BaseOption = EMBEDDED,
    on: OnOption = None,
    experts: ExpertsOption,
    profiles: ServedStoreOption = None,
    questions: ServedQuestionsOption = None,
    port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Port to listen on. By default 8000, or a free port if 8000 is in use."),
    ] = None,
    dimensions: DimensionsOption = None,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in your browser.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    same_base: SameBaseOption = False,
) -> None:
    """Serve a page with a slider for each dimension, on this machine only.

    The page shows the answers of the base and of the mixture side by side. With --profiles, it also saves and compares
    mixtures. With --questions, it also asks you questions, and moves the sliders to what you prefer.
    """
    check_extra("serve", "fastapi", "uvicorn", "prometheus_client", "sqlalchemy")
    loading = LoadOptions(base, device, checked_dtype(dtype), same_base, on)
    settings = Settings(served_name(base), Rules(hosts=[HOST]), started_with=started_with(base, experts, on))
    ServerRun(
        loading,
        ServedFiles(experts, profiles, questions, dimensions),
        settings,
        port=PORT if port is None else port,
        takes_any_port=port is None,
        opens_browser=open_browser,
    ).run()
