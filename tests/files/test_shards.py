from __future__ import annotations

import json
import warnings
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
        ({"a": "../one.safetensors"}, "which is not a plain file name"),
        ({"a": "/etc/passwd"}, "which is not a plain file name"),
        ({"a": 3}, "which is not a plain file name"),
        ({"a": "pytorch_model-1.bin"}, "pickle"),
        ({"a": "./three.safetensors"}, "the shard three.safetensors is missing"),
        ({"a": "sub/one.safetensors"}, "which is not a plain file name"),
        ({"a": None}, "which is not a plain file name"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, weight_map: Any, message: str) -> None:
    with pytest.raises(FileFormatError, match=message):
        Checkpoint.open(write_sharded(tmp_path, weight_map))


DIFFERING: dict[str, tuple[dict[str, str], str]] = {
    "one less": ({"a": "one.safetensors", "b": "two.safetensors"}, "the index does not name c, which a shard has"),
    "one more": (
        {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors", "d": "two.safetensors"},
        "the index names d, which no shard has",
    ),
    "another shard": (
        {"a": "two.safetensors", "b": "one.safetensors", "c": "one.safetensors"},
        "the index names the wrong shard for a and 1 more",
    ),
}


@pytest.mark.parametrize("kind", DIFFERING)
def test_what_the_shards_hold_is_read_where_the_index_differs(tmp_path: Path, kind: str) -> None:
    weight_map, message = DIFFERING[kind]
    with pytest.warns(RuntimeWarning, match=message) as caught:
        checkpoint = Checkpoint.open(write_sharded(tmp_path, weight_map))
    assert "None" not in str(caught[0].message)
    assert sorted(checkpoint) == ["a", "b", "c"]
    assert {name: checkpoint.tensor(name).tolist() for name in checkpoint} == {
        "a": [[1, 1], [1, 1]],
        "b": [0, 1, 2, 3],
        "c": [0, 0, 0],
    }
    assert checkpoint.shard_of("b").path.name == "two.safetensors"


def test_paths_may_say_that_shards_are_beside_the_index(tmp_path: Path) -> None:
    names = {"a": "./one.safetensors", "b": "./two.safetensors", "c": "one.safetensors"}
    checkpoint = Checkpoint.open(write_sharded(tmp_path, names))
    assert list(checkpoint.shards) == ["one.safetensors", "two.safetensors"]


# An index next to a whole file: the contents of the index, and whether it names the whole file.
BESIDE: dict[str, tuple[dict[str, Any], bool]] = {
    "of the whole file": ({"weight_map": {"a": "model.safetensors"}}, True),
    "of other shards": ({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}, False),
    "of shards that are gone": ({"weight_map": {"a": "three.safetensors"}}, False),
    "without a table": ({}, False),
}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_whole_file_comes_before_an_index_as_in_transformers(tmp_path: Path, kind: str) -> None:
    index, is_of_whole = BESIDE[kind]
    write_sharded(tmp_path)
    oracles.write_tensors(tmp_path / "model.safetensors", {"a": ("F32", np.full(2, 5))})
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.tensor("a").tolist() == [5, 5]
    assert list(checkpoint) == ["a"]
    assert checkpoint.has_index == is_of_whole
    assert ["names other files" in str(each.message) for each in caught] == ([] if is_of_whole else [True])


def test_a_whole_file_that_is_none_does_not_hide_the_index(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    (tmp_path / "model.safetensors").symlink_to("gone")
    assert sorted(Checkpoint.open(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize("name", ["one.safetensors", "model.safetensors.index.json"])
def test_a_git_lfs_pointer_is_named_with_the_command(tmp_path: Path, name: str) -> None:
    write_sharded(tmp_path)
    (tmp_path / name).write_bytes(oracles.LFS_POINTER)
    with pytest.raises(FileFormatError, match="this is a Git LFS pointer") as caught:
        Checkpoint.open(tmp_path)
    assert caught.value.where == str(tmp_path / name)
    assert "git lfs pull" in caught.value.mend


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    oracles.write_tensors(tmp_path / "two.safetensors", {"b": ("F16", np.arange(4)), "a": ("F32", np.ones(1))})
    with pytest.raises(FileFormatError, match=r"tensor a is in both one\.safetensors and two\.safetensors"):
        Checkpoint.open(tmp_path)


def test_pickled_weights_are_refused_and_no_weights_named(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match=r"neither model.safetensors nor"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileFormatError, match="pickle"):
        Checkpoint.open(tmp_path)
    with pytest.raises(FileFormatError, match="the folder does not exist"):
        Checkpoint.open(tmp_path / "nowhere")
