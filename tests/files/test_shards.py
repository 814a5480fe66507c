from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups.errors import FileFormatError
from personalized_soups.files.shards import Checkpoint
from tests import oracles


def write_sharded(folder: Path, weight_map: Any = None) -> Path:
    oracles.write_tensors(folder / "one.safetensors", {"a": ("F32", np.ones((2, 2))), "c": ("F32", np.zeros(3))})
    oracles.write_tensors(folder / "two.safetensors", {"b": ("F16", np.arange(4))})
    names = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    index = {"metadata": {"total_size": 36}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_sharded(tmp_path))
    assert sorted(checkpoint) == ["a", "b", "c"]
    assert checkpoint.tensor("b").tolist() == [0, 1, 2, 3]
    assert checkpoint.has_index
    assert checkpoint.num_bytes == sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))


def test_one_file_needs_no_index(tmp_path: Path) -> None:
    oracles.write_tensors(tmp_path / "model.safetensors", {"a": ("F32", np.ones(2))})
    checkpoint = Checkpoint.open(tmp_path)
    assert list(checkpoint) == ["a"]
    assert not checkpoint.has_index


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({}, "no weight_map"),
        ([], "no weight_map"),
        ({"a": "three.safetensors"}, "the shard three.safetensors is missing"),
        ({"a": "../one.safetensors"}, "not a file beside it"),
        ({"a": "/etc/passwd"}, "not a file beside it"),
        ({"a": 3}, "not a file beside it"),
        ({"a": "pytorch_model-1.bin"}, "pickle"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, "c: the index says None"),
        ({"a": "one.safetensors", "b": "one.safetensors", "c": "one.safetensors"}, "b: the index says one"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Checkpoint.open(write_sharded(tmp_path, weight_map))


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    oracles.write_tensors(tmp_path / "two.safetensors", {"b": ("F16", np.arange(4)), "a": ("F32", np.ones(1))})
    with pytest.raises(FileFormatError, match=r"a: stands in one\.safetensors and in two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_refused_and_no_weights_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"neither model.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileFormatError, match="pickle"):
        Checkpoint.open(tmp_path)
    with pytest.raises(FileFormatError, match="no such folder"):
        Checkpoint.open(tmp_path / "nowhere")
