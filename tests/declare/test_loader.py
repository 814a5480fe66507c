from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.loader import dump, load, load_data, load_text, read_text
from personalized_soups.errors import DeclarationError


class Inner(Declared):
    name: str = "x"
    size: int = 1


class Outer(Declared):
    number: float = 0.0
    words: tuple[str, ...] = ()
    inner: Inner = Field(default_factory=Inner)
    table: dict[str, Inner] = Field(default_factory=dict)
    path: Path | None = None


def refused(text: str, model: type[Declared] = Outer) -> DeclarationError:
    with pytest.raises(DeclarationError) as caught:
        load_text(text, model, "file.yaml")
    return caught.value


def test_yaml_1_2_has_no_norway_and_reads_exponents() -> None:
    class Scalars(Declared):
        values: dict[str, Any]

    text = """
values:
  norway: no
  on: on
  exponent: 1e-3
  octal: 0o17
  hexadecimal: 0xff
  leading: 010
  date: 2026-01-01
  underscores: 1_000
  quoted: "1.5"
  true: true
  empty:
"""
    assert load_text(text, Scalars, "s").values == {
        "norway": "no",
        "on": "on",
        "exponent": 1e-3,
        "octal": 15,
        "hexadecimal": 255,
        "leading": 10,
        "date": "2026-01-01",
        "underscores": "1_000",
        "quoted": "1.5",
        "true": True,
        "empty": None,
    }


def test_lists_fill_tuples_and_text_fills_paths() -> None:
    loaded = load_text("words: [a, b]\npath: some/where", Outer, "s")
    assert (loaded.words, loaded.path) == (("a", "b"), Path("some/where"))


def test_unknown_keys_are_told_with_line_and_nearest_name() -> None:
    error = refused("number: 1\ninner:\n  naem: y\n")
    assert error.what == "unknown key 'naem'"
    assert error.where == "file.yaml:3: inner.naem"
    assert error.mend == "did you mean 'name'?"


def test_keys_below_a_mapping_of_models_are_suggested_too() -> None:
    error = refused("table:\n  a:\n    size: 2\n    sizes: 3\n")
    assert (error.where, error.mend) == ("file.yaml:4: table.a.sizes", "did you mean 'size'?")


def test_a_key_with_no_like_is_answered_with_the_list() -> None:
    assert refused("inner: {qqq: 1}").mend == "choose from: name, size"


def test_every_fault_is_told_at_once() -> None:
    error = refused("number: one\ninner:\n  size: 1.5\n")
    assert error.what.splitlines()[0] == "the input has 2 faults:"
    assert "file.yaml:1: number: " in error.what
    assert "file.yaml:3: inner.size: " in error.what
    assert error.where == "file.yaml"


@pytest.mark.parametrize(
    ("text", "where", "what", "mend"),
    [
        ("number: .nan", "file.yaml:1: number", "finite", "write a finite number"),
        ("number: -.inf", "file.yaml:1: number", "finite", "write a finite number"),
        ("number: 1e999", "file.yaml:1: number", "finite", "write a finite number"),
        ("number: true", "file.yaml:1: number", "found True", "write a number"),
        ("words: a", "file.yaml:1: words", "found 'a'", "write a list"),
        ("inner: 3", "file.yaml:1: inner", "found 3", "indented"),
        ("number: 1\nnumber: 2", "file.yaml:2: number", "the key 'number' is repeated", "line 1 or line 2"),
        ("inner:\n  size: 1\n  size: 1", "file.yaml:3: inner.size", "repeated", "line 2 or line 3"),
        ("inner: &a {}\ntable: {x: *a}", "file.yaml:1: table.x", "alias", "repeat the value"),
        ("number: !!python/name:os.system x", "file.yaml:1: number", "tag", "remove the tag"),
        ("inner: !thing {}", "file.yaml:1: inner", "tag", "remove the tag"),
        ("? [a]\n: 1", "file.yaml:1", "a key is not plain text", "key: value"),
        ("number: 1\n---\nnumber: 2", "file.yaml:2", "another document", "one document"),
        ("inner:\n\tsize: 1", "file.yaml:2", "not YAML", "spaces, not tabs"),
        ("inner: {size: 1", "file.yaml:1", "not YAML", "brackets"),
        ("number: \x01", "file.yaml", "not YAML", "control character"),
        ("", "file.yaml", "but it is empty", "number, words, inner"),
        ("# only a comment\n", "file.yaml", "but it is empty", "number, words, inner"),
        ("- 1", "file.yaml", "but it is a list", "number, words, inner"),
        ("just text", "file.yaml", "but it is a str", "number, words, inner"),
        ("words: " + "[" * 80 + "]" * 80, "file.yaml:1: words", "nested more than 64 levels", "flatten"),
    ],
)
def test_what_cannot_be_read_is_told_with_place_and_mend(text: str, where: str, what: str, mend: str) -> None:
    error = refused(text)
    assert error.where == where
    assert what in error.what
    assert mend in error.mend
    assert error.exit_code == 2


def test_json_may_be_indented_by_tabs_and_its_faults_have_lines() -> None:
    assert load_text('{\n\t"number": 1.5,\n\t"words": ["a\\tb"]\n}', Outer, "s").words == ("a\tb",)
    error = refused('{\n\t"number": 1,\n\t"numbr": 2\n}')
    assert (error.where, error.mend) == ("file.yaml:3: numbr", "did you mean 'number'?")


@given(
    st.recursive(st.none() | st.booleans() | st.integers() | st.text(), lambda x: st.lists(x, max_size=3), max_leaves=5)
)
def test_json_reads_as_json_reads_it(value: object) -> None:
    class Anything(Declared):
        value: Any

    # a UTF-8 file cannot contain lone surrogates; control characters are escaped
    text = json.dumps({"value": value}, ensure_ascii=True)
    if "\\ud" in text:
        return
    assert load_text(text, Anything, "s").value == value


def test_files_that_cannot_be_read_name_themselves(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    with pytest.raises(DeclarationError, match="the file does not exist") as caught:
        load(missing, Outer)
    assert caught.value.where == str(missing)
    with pytest.raises(DeclarationError, match="cannot be read"):
        load(tmp_path, Outer)


def test_a_wrong_encoding_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("number: 1\nwords: [ä]\n".encode("latin-1"))
    with pytest.raises(DeclarationError, match="not UTF-8: byte 0xe4") as caught:
        load(path, Outer)
    assert caught.value.where == f"{path}:2"


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfnumber: 2")
    assert read_text(path) == "number: 2"
    assert load(path, Outer).number == 2.0


def test_dump_reads_back_equal_and_keeps_the_order() -> None:
    declared = Outer(number=1e-3, words=("no", "1.5", "a: b", "ü"), table={"z": Inner(size=2), "a": Inner(name="on")})
    text = dump(declared)
    assert load_text(text, Outer, "s") == declared
    assert text.index("z:") < text.index("a:", text.index("z:"))
    assert "path" not in text


def test_a_declaration_remembers_its_lines_through_a_change() -> None:
    loaded = load_text("inner:\n  size: 3\ntable:\n  a: {}\n", Outer, "file.yaml")
    changed = loaded.replaced(number=2.0)
    assert changed.place("inner", "size") == "file.yaml:2: inner.size"
    assert changed.place("table", "b") == "file.yaml:3: table.b"
    assert changed.place("number") == "file.yaml: number"
    assert (changed.inner.size, changed.number) == (3, 2.0)
    assert Outer(number=2.0).place("number") == "Outer number"


def test_declarations_are_equal_wherever_they_stand() -> None:
    assert load_text("number: 1", Outer, "a") == load_text("\n\nnumber: 1.0", Outer, "b")


def test_a_change_is_checked() -> None:
    with pytest.raises(ValueError, match="finite"):
        Outer().replaced(number=math.inf)


def test_data_from_elsewhere_is_named_by_its_source() -> None:
    with pytest.raises(DeclarationError) as caught:
        load_data({"inner": {"sise": 1}}, Outer, "--option")
    assert (caught.value.where, caught.value.mend) == ("--option: inner.sise", "did you mean 'size'?")


@pytest.mark.parametrize("text", ["[" * 10_000, "number: " + "{a: " * 500])
def test_nesting_beyond_reason_is_refused(text: str) -> None:
    with pytest.raises(DeclarationError, match="nested too deep") as caught:
        load_text(text, Outer, "deep.yaml")
    assert caught.value.where == "deep.yaml"


def test_a_number_beyond_reason_is_refused_with_its_line() -> None:
    with pytest.raises(DeclarationError, match="5000 digits") as caught:
        load_text("\nnumber: " + "9" * 5000, Outer, "long.yaml")
    assert caught.value.where == "long.yaml:2: number"
