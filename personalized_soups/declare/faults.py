"""Turn pydantic's errors into a DeclarationError that gives the fault, its place (file, line and key) and its fix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from personalized_soups.declare.declared import Declared, KeyPath, Places
from personalized_soups.errors import DeclarationError, choose_from, nearest

# The fix for each kind of error. The keys are the beginnings of pydantic's error types; the first match is used.
_MENDS: tuple[tuple[str, str], ...] = (
    ("missing", "add the key"),
    ("finite_number", "write a finite number, for example 0.5"),
    ("float", "write a number, for example 0.5"),
    ("int", "write a whole number"),
    ("bool", "write true or false"),
    ("string_pattern", "write text that has the form given in the message"),
    ("string", "write text; put it in quotes if it looks like a number"),
    ("dict", "write indented `name: value` lines below the key"),
    ("model", "write indented `key: value` lines below the key"),
    ("tuple", "write a list: [a, b]"),
    ("list", "write a list: [a, b]"),
    ("too_short", "give at least one value"),
    ("greater_than", "write a larger number"),
    ("less_than", "write a smaller number"),
)


def declaration_error(error: ValidationError, model: type[Declared], places: Places) -> DeclarationError:
    """Return one error that lists all faults that pydantic found, and the line, the key and the fix of each fault."""
    schema = model.model_json_schema()
    faults = [_fault(details, schema, places) for details in error.errors(include_url=False)]
    what, where, mend = faults[0]
    if len(faults) == 1:
        return DeclarationError(what, where=where, mend=mend)
    lines = [f"{where}: {what}; {mend}" for what, where, mend in faults]
    return DeclarationError(
        "\n  ".join([f"the input has {len(faults)} faults:", *lines]),
        where=places.source,
        mend="fix each line named above",
    )


def _fault(details: ErrorDetails, schema: Mapping[str, Any], places: Places) -> tuple[str, str, str]:
    kind, context = details["type"], details.get("ctx", {})
    path = _path_in_file(details, places)
    if "mend" in context:
        return context["what"], places.of((*path, *context["key"])), context["mend"]
    where = places.of(path)
    if kind == "extra_forbidden":
        known = set(_keys(schema, schema, details["loc"][:-1]))
        return f"unknown key {str(path[-1])!r}", where, choose_from(str(path[-1]), known)
    if kind == "missing":
        return f"the key {path[-1]!r} is missing", where, f"add a line `{path[-1]}: ...`"
    if kind in {"literal_error", "union_tag_invalid"}:
        return _unknown_value(details, context, path, where)
    message = details["msg"][0].lower() + details["msg"][1:]
    return f"{message}, but found {_shown(details['input'])}", where, _mend(kind)


def _unknown_value(
    details: ErrorDetails, context: Mapping[str, Any], path: KeyPath, where: str
) -> tuple[str, str, str]:
    known = context.get("expected", context.get("expected_tags", "")).replace(" or ", ", ")
    found = context.get("tag", details["input"])
    names = [name.strip().strip("'") for name in known.split(", ")]
    key = path[-1] if path else "value"
    mend = f"choose from: {', '.join(names)}"
    if isinstance(found, str) and (near := nearest(found, names)):
        mend = f"did you mean {near!r}? ({mend})"
    return f"{_shown(found)} is not a valid {key}", where, mend


def _path_in_file(details: ErrorDetails, places: Places) -> KeyPath:
    """Return pydantic's `loc` without the parts that are not keys of the file, such as the names of union members."""
    path: KeyPath = ()
    loc = details["loc"]
    for index, part in enumerate(loc):
        in_file = (*path, part) in places.lines
        is_absent_key = details["type"] == "missing" and index == len(loc) - 1
        if in_file or is_absent_key:
            path = (*path, part)
    return path


def _keys(schema: Mapping[str, Any], root: Mapping[str, Any], loc: tuple[int | str, ...]) -> Iterator[str]:
    """Yield the keys that the JSON schema allows in the object at the path `loc`."""
    if "$ref" in schema:
        schema = root["$defs"][schema["$ref"].rsplit("/", 1)[-1]]
    for variant in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        tag = _tag(variant, root)
        if tag is None:
            yield from _keys(variant, root, loc)
        elif loc and loc[0] == tag:
            yield from _keys(variant, root, loc[1:])
    if not loc:
        yield from schema.get("properties", {})
        return
    by_pattern = schema.get("patternProperties", {}).values()
    for inner in (schema.get("properties", {}).get(loc[0]), schema.get("additionalProperties"), *by_pattern):
        if isinstance(inner, Mapping):
            yield from _keys(inner, root, loc[1:])


def _tag(variant: Mapping[str, Any], root: Mapping[str, Any]) -> object:
    if "$ref" in variant:
        variant = root["$defs"][variant["$ref"].rsplit("/", 1)[-1]]
    return variant.get("properties", {}).get("kind", {}).get("const")


def _mend(kind: str) -> str:
    return next(
        (mend for prefix, mend in _MENDS if kind.startswith(prefix)),
        "see docs/schemas for the values that are allowed here",
    )


def _shown(value: object, limit: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
