"""The hidden command `psoups reference`, which writes docs/reference/cli.md and docs/schemas/.

Tests compare these files with the code.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from personalized_soups.cli import render

if TYPE_CHECKING:
    from collections.abc import Iterator

    from personalized_soups.declare.declared import Declared

_HEAD = """# The command line

Every command and option of `psoups`, as `--help` prints it. Written by `make reference`; do not edit.
"""
_WIDTH = 100


def register(app: typer.Typer) -> None:
    """Add the hidden command `reference`."""
    app.command("reference", hidden=True)(reference)


def reference(
    docs: Annotated[Path, typer.Argument(help="The docs folder.", exists=True, file_okay=False)] = Path("docs"),
) -> None:
    """Write docs/reference/cli.md and docs/schemas/*.json."""
    pages = {"reference/cli.md": cli_page(), **{f"schemas/{name}": text for name, text in schema_pages().items()}}
    for name, text in pages.items():
        path = docs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        render.say(str(path))


def cli_page() -> str:
    """Return the text of docs/reference/cli.md: the help of every command that is not hidden."""
    from personalized_soups.cli.app import build_app

    command = typer.main.get_command(build_app())
    return "\n".join([_HEAD, *_helps(command, "psoups", None)])


def schema_pages() -> dict[str, str]:
    """Return the JSON schemas of the files that people write, by file name."""
    from personalized_soups.declare.base_table import BaseTable
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.evaluation import StudyRecipe
    from personalized_soups.declare.judge import JudgeFile
    from personalized_soups.declare.persona import Persona
    from personalized_soups.declare.preference_data import LabelledAnswers, Rollout
    from personalized_soups.declare.profile import Profile
    from personalized_soups.declare.run_recipe import RunRecipe
    from personalized_soups.declare.training import GrpoRecipe, RewardRecipe, SftRecipe, TrainingRecipe

    models: dict[str, type[Declared]] = {
        "profile": Profile,
        "dimensions": Catalogue,
        "persona": Persona,
        "train": TrainingRecipe,
        "train-reward": RewardRecipe,
        "train-grpo": GrpoRecipe,
        "train-sft": SftRecipe,
        "evaluation": StudyRecipe,
        "run": RunRecipe,
        "bases": BaseTable,
        "judge": JudgeFile,
        "rollouts": Rollout,
        "labels": LabelledAnswers,
    }
    return {f"{name}.schema.json": json.dumps(_schema(model), indent=2) + "\n" for name, model in models.items()}


def _schema(model: type[Declared]) -> dict[str, Any]:
    """Return the JSON schema of a model. Its descriptions leave out the Python examples of the docstrings."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **model.model_json_schema()}
    for definition in (schema, *schema.get("$defs", {}).values()):
        if "description" in definition:
            definition["description"] = definition["description"].partition("\n\nExample:")[0]
    return schema


def _helps(command: object, name: str, parent: object) -> Iterator[str]:
    context = command.make_context(name, [], parent=parent, resilient_parsing=True, terminal_width=_WIDTH)  # type: ignore[attr-defined]
    title = context.command_path
    yield f"## {title}\n\n```text\n{command.get_help(context).strip()}\n```\n"  # type: ignore[attr-defined]
    for child_name, child in getattr(command, "commands", {}).items():
        if not child.hidden:
            yield from _helps(child, child_name, context)
