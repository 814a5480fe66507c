from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.cli.reference import cli_page, schema_pages
from personalized_soups.declare.shipped import recipes_folder

DOCS = Path(__file__).parents[2] / "docs"


def test_the_page_of_commands_is_current() -> None:
    assert (DOCS / "reference" / "cli.md").read_text(encoding="utf-8") == cli_page(), "run `make reference`"


def test_the_schemas_are_current() -> None:
    written = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "schemas").glob("*.json")}
    assert written == schema_pages(), "run `make reference`"


@pytest.mark.parametrize("name", sorted(schema_pages()))
def test_schemas_allow_no_additional_properties(name: str) -> None:
    schema = json.loads(schema_pages()[name])
    for definition in (schema, *schema.get("$defs", {}).values()):
        assert definition["additionalProperties"] is False


def test_every_recipe_names_its_schema() -> None:
    recipes = sorted(recipes_folder().rglob("*.yaml"))
    assert len(recipes) >= 5
    for recipe in recipes:
        first = recipe.read_text(encoding="utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (recipe.parent / first.partition("=")[2]).resolve().is_file()
