"""The directive `schema-table`: the keys of one file format, a table for each object.

The tables are generated, so the pages list exactly the keys that the code accepts.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sphinx.application import Sphinx

_SCHEMAS = Path(__file__).resolve().parent.parent / "schemas"
_BOUNDS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}


class SchemaTable(SphinxDirective):
    """List the keys of a format: type, default, meaning.

    The argument is the name of a schema in docs/schemas/, or `module:Class` of another declared model.
    """

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the tables, parsed as the page's own Markdown is."""
        module, colon, model = self.arguments[0].partition(":")
        if colon:
            schema = getattr(import_module(module), model).model_json_schema()
        else:
            path = _SCHEMAS / f"{self.arguments[0]}.schema.json"
            self.env.note_dependency(str(path))
            schema = json.loads(path.read_text(encoding="utf-8"))
        container = nodes.container()
        lines = StringList(list(_lines(schema)), source=self.arguments[0])
        self.state.nested_parse(lines, self.content_offset, container)
        return container.children


def _lines(schema: Mapping[str, Any]) -> Iterator[str]:
    yield from _table("The file", schema)
    for name, definition in schema.get("$defs", {}).items():
        if "properties" in definition:
            yield from _table(f"`{name}`", definition)


def _table(title: str, schema: Mapping[str, Any]) -> Iterator[str]:
    about = schema.get("description", "").partition("\n\nExample:")[0]
    yield from (f"**{title}**: {' '.join(about.split())}", "")
    yield from ("| key | type | default | meaning |", "|---|---|---|---|")
    required = schema.get("required", [])
    for key, field in schema["properties"].items():
        default = "required" if key in required else _default(field)
        yield f"| `{key}` | {_type(field)} | {default} | {field.get('description', '')} |".replace("  ", " ")
    yield ""


def _default(field: Mapping[str, Any]) -> str:
    return f"`{json.dumps(field['default'])}`" if "default" in field else ""


def _type(field: Mapping[str, Any]) -> str:
    """Return a schema's type in words: `number > 0`, a list of names, another table's name."""
    if "$ref" in field:
        return f"`{field['$ref'].rpartition('/')[2]}`"
    if "const" in field or "enum" in field:
        return ", ".join(f"`{value}`" for value in field.get("enum", [field.get("const")]))
    if choices := field.get("anyOf", field.get("oneOf")):
        return " or ".join(dict.fromkeys(_type(choice) for choice in choices))
    kind = field.get("type", "any value")
    if kind == "array":
        return f"list of {_type(field.get('items', {}))}"
    if kind == "object":
        values = next(iter(field.get("patternProperties", {}).values()), field.get("additionalProperties"))
        return f"map of names to {_type(values) if isinstance(values, dict) and values else 'values'}"
    bounds = "".join(f" {sign} {field[bound]:g}" for bound, sign in _BOUNDS.items() if bound in field)
    return f"{kind}{bounds}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    app.add_directive("schema-table", SchemaTable)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
