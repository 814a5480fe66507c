"""`psoups study`: the studies about users."""

from __future__ import annotations

import typer

from personalized_soups.cli.study.elicitation import elicitation
from personalized_soups.cli.study.papi import papi


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(help="Studies about users.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_study)
    group.command("elicitation")(elicitation)
    group.command("papi")(papi)
    app.add_typer(group, name="study")


def _study() -> None:
    """Studies of what answers tell about users."""
