"""Load YAML 1.2 and JSON files into declared models. Every error names the file, the line and the key, and gives a fix.

ruamel.yaml parses the file into a tree of nodes with line numbers. This module builds the values from the nodes by the
rules of YAML 1.2: `no` is a string and `1e-3` is a number. It rejects repeated keys, aliases and tags, and it never
creates a date or a Python object. pydantic then checks the values.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from personalized_soups.declare.declared import Declared, KeyPath, Places, dotted
from personalized_soups.declare.faults import declaration_error
from personalized_soups.errors import DeclarationError
from personalized_soups.files.regular import check_no_lfs_pointer

T = TypeVar("T", bound=Declared)

# The core schema of YAML 1.2, section 10.3.2. ruamel's own resolver also accepts dates, merge keys, and underscores in
# numbers, which are YAML 1.1.
_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_WORDS: Mapping[str, object] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".inf", ".Inf", ".INF", "+.inf", "+.Inf", "+.INF"), math.inf),
    **dict.fromkeys(("-.inf", "-.Inf", "-.INF"), -math.inf),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
}
_TAGS = frozenset(
    f"tag:yaml.org,2002:{kind}"
    for kind in ("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "merge", "value")
)
_MAX_DEPTH = 64
_MAX_DIGITS = 1000


def load(path: Path, model: type[T]) -> T:
    """Read a YAML or JSON file, check it against the pydantic model `model`, and return the object.

    Raises:
        DeclarationError: if the file cannot be read or its content is invalid.

    Example:
        >>> load(shipped_recipe("train/tiny.yaml"), TrainingRecipe).lora.rank
        8
    """
    return load_text(read_text(path), model, str(path))


def load_text(text: str, model: type[T], source: str) -> T:
    """Check a YAML or JSON text against `model` and return the object. Error messages use `source` as the file name.

    Raises:
        DeclarationError: if the text is invalid.
    """
    lines: dict[KeyPath, int | None] = {}
    document = _document(text, source, lines)
    return _checked(document, model, Places(source, lines))


def load_data(data: Mapping[str, Any], model: type[T], source: str) -> T:
    """Check a mapping against `model` and return the object. Error messages use `source` as the file name.

    Raises:
        DeclarationError: if the mapping is invalid.
    """
    return _checked(dict(data), model, Places(source, dict.fromkeys(_paths(data, ()))))


def dump(declared: Declared) -> str:
    """Return `declared` as YAML 1.2 text. `load_text` turns the text into an equal object."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment] # ruamel annotates it as None
    stream = io.StringIO()
    yaml.dump(declared.model_dump(mode="json", exclude_unset=True), stream)
    return stream.getvalue()


def read_text(path: Path) -> str:
    """Return the text of a file.

    Raises:
        DeclarationError: if the file does not exist, cannot be read, or is not UTF-8.
        FileFormatError: if the file is a Git LFS pointer.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DeclarationError(
            "the file does not exist", where=str(path), mend="check the path; it is relative to the current folder"
        ) from None
    except OSError as error:
        raise DeclarationError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="give a readable YAML or JSON file"
        ) from error
    check_no_lfs_pointer(data, path)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DeclarationError(
            f"the file is not UTF-8: byte 0x{data[error.start]:02x} is invalid",
            where=f"{path}:{line}",
            mend="save the file as UTF-8",
        ) from None


def _checked(document: object, model: type[T], places: Places) -> T:
    if not isinstance(document, dict):
        kind = "is empty" if document is None else f"is a {type(document).__name__}"
        raise DeclarationError(
            f"the content must be `key: value` lines, but it {kind}",
            where=places.source,
            mend=f"write the keys of a {_keys_of(model)}",
        )
    try:
        # In JSON mode, strict validation accepts a list for a tuple and a string for a Path.
        return model.model_validate_json(json.dumps(document)).with_places(places)
    except ValidationError as error:
        raise declaration_error(error, model, places) from None


def _paths(value: object, path: KeyPath) -> Iterator[KeyPath]:
    """Yield the path of `value` and the paths of all keys and items in it."""
    yield path
    inner = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, item in inner:
        yield from _paths(item, (*path, key))


def _keys_of(model: type[Declared]) -> str:
    return f"{model.__name__.lower()}: {', '.join(model.model_fields)}"


def _document(text: str, source: str, lines: dict[KeyPath, int | None]) -> object:
    # Tabs are allowed as indentation in JSON but not in YAML. A JSON string has no raw tabs, so no value changes here.
    if text.lstrip().startswith("{"):
        text = text.replace("\t", " ")
    try:
        node = YAML(typ="safe", pure=True).compose(text)
    except RecursionError:
        raise DeclarationError("the content is nested too deeply", where=source, mend="check the brackets") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = source if mark is None else f"{source}:{mark.line + 1}"
        raise DeclarationError(
            f"the content is not YAML: {error.problem or error.context}",
            where=where,
            mend=_syntax_mend(error.problem or ""),
        ) from None
    except YAMLError as error:
        mend = "remove the control character"
        raise DeclarationError(
            f"the content is not YAML: {str(error).splitlines()[0]}", where=source, mend=mend
        ) from None
    return None if node is None else _Builder(source, lines).build(node, ())


def _syntax_mend(problem: str) -> str:
    if "\\t" in problem:
        return "indent with spaces, not tabs"
    if "another document" in problem:
        return "keep one document in a file: remove every `---` line after the first"
    return "check the indentation, the brackets and the quotes on this line and the line before"


class _Builder:
    """Turns a tree of nodes into dicts, lists and scalars, and records the line number of every key."""

    def __init__(self, source: str, lines: dict[KeyPath, int | None]) -> None:
        self._source = source
        self._lines = lines
        self._seen: set[int] = set()

    def build(self, node: Node, path: KeyPath) -> object:
        if id(node) in self._seen:
            raise self._rejected(
                node, path, "an alias (`*name`) is not supported", "repeat the value instead of the alias"
            )
        self._seen.add(id(node))
        if len(path) > _MAX_DEPTH:
            raise self._rejected(
                node, path[:1], f"the value is nested more than {_MAX_DEPTH} levels deep", "flatten the value"
            )
        if str(node.tag) not in _TAGS:
            raise self._rejected(node, path, f"the tag {str(node.tag)!r} is not supported", "remove the tag")
        self._lines.setdefault(path, node.start_mark.line + 1)
        makers: Mapping[type[Node], Callable[[Any, KeyPath], object]] = {
            MappingNode: self._mapping,
            SequenceNode: self._sequence,
            ScalarNode: self._scalar,
        }
        return makers[type(node)](node, path)

    def _mapping(self, node: MappingNode, path: KeyPath) -> dict[str, object]:
        built: dict[str, object] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                raise self._rejected(key_node, path, "a key is not plain text", "write `key: value`")
            key = str(key_node.value)
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in built:
                first = self._lines[here]
                mend = f"keep one of the two: line {first} or line {line}"
                raise self._rejected(key_node, here, f"the key {key!r} is repeated", mend)
            self._lines[here] = line
            built[key] = self.build(value_node, here)
        return built

    def _sequence(self, node: SequenceNode, path: KeyPath) -> list[object]:
        return [self.build(item, (*path, index)) for index, item in enumerate(node.value)]

    def _scalar(self, node: ScalarNode, path: KeyPath) -> object:
        text = str(node.value)
        if node.style in {"'", '"', "|", ">"}:
            return text
        if text in _WORDS:
            return _WORDS[text]
        if _INT.fullmatch(text):
            if len(text) > _MAX_DIGITS:  # Python refuses to convert very long integers
                raise self._rejected(node, path, f"a number has {len(text)} digits", f"use at most {_MAX_DIGITS}")
            return int(text, 10 if text.lstrip("+-").isdigit() else 0)
        return float(text) if _FLOAT.fullmatch(text) else text

    def _rejected(self, node: Node, path: KeyPath, what: str, mend: str) -> DeclarationError:
        where = f"{self._source}:{node.start_mark.line + 1}"
        return DeclarationError(what, where=f"{where}: {dotted(path)}" if path else where, mend=mend)
