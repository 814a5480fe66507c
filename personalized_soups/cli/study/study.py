"""`psoups study`: studies of users and of experts on other people's data."""

from __future__ import annotations

import typer

from personalized_soups.cli.study.elicitation import elicitation
from personalized_soups.cli.study.papi import papi
from personalized_soups.cli.study.persona import persona
from personalized_soups.cli.study.ten_answers import ten_answers


def register(app: typer.Typer) -> None:
    """Add the group of commands to the application."""
    group = typer.Typer(help="Studies of users and of experts.", no_args_is_help=True, rich_markup_mode=None)
    group.callback()(_study)
    group.command("elicitation")(elicitation)
    group.command("papi")(papi)
    group.command("persona")(persona)
    group.command("ten-answers")(ten_answers)
    app.add_typer(group, name="study")


def _study() -> None:
    """Studies of what answers tell about users, and of what experts learn from labels that are not ours."""
