"""A file of examples is read whole, or its wrong line is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalized_soups import Example
from personalized_soups.errors import DeclarationError
from personalized_soups.users.tuning.examples import read_examples


def test_every_line_is_an_example(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes('{"prompt": "a", "text": "b\\nc"}\n\n{"text": "ü", "prompt": "d"}'.encode())
    assert read_examples(path) == [Example(prompt="a", text="b\nc"), Example(prompt="d", text="ü")]


@pytest.mark.parametrize(
    ("content", "what", "line"),
    [
        (b"", "the file holds no examples", ""),
        (b"\n\n", "the file holds no examples", ""),
        (b'{"prompt": "a", "text": "b"}\nhello', "the line is not JSON", ":2"),
        (b'["a", "b"]', "the line holds a list, which is not an example", ":1"),
        (b'{"prompt": "a"}', "text", ":1"),
        (b'{"prompt": "a", "text": "b"}\n{"prompt": "a", "text": "b", "user": "c"}', "user", ":2"),
        (b'{"prompt": "a", "text": " "}', "text", ":1"),
        (b'{"prompt": "a", "text": "\xff"}', "not UTF-8", ":1"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, content: bytes, what: str, line: str) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_bytes(content)
    with pytest.raises(DeclarationError) as caught:
        read_examples(path)
    assert what in str(caught.value)
    assert caught.value.where.startswith(f"{path}{line}")


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(DeclarationError, match="does not exist"):
        read_examples(tmp_path / "texts.jsonl")
