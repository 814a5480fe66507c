from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from personalized_soups.files.writer import TensorSpec, spec_of, write_safetensors
from tests import oracles

TENSORS = {
    "z": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "scalar": torch.tensor(3.0, dtype=torch.float16),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(6, dtype=torch.float64).reshape(2, 3).T,
}
SPECS = [spec_of(name, tensor) for name, tensor in TENSORS.items()]


def test_the_reference_reader_reads_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_safetensors(path, SPECS, TENSORS.items(), {"format": "pt"})
    read = safetensors.torch.load_file(path)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    assert oracles.split_file(path)[0]["__metadata__"] == {"format": "pt"}


def test_tensors_may_come_in_any_order_and_as_bytes(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "one", SPECS, TENSORS.items())
    write_safetensors(tmp_path / "two", SPECS, reversed(TENSORS.items()))
    raw = {name: memoryview(data) for name, (_, _, data) in oracles.raw_tensors(tmp_path / "one").items()}
    write_safetensors(tmp_path / "three", SPECS, raw.items())
    one = (tmp_path / "one").read_bytes()
    assert (tmp_path / "two").read_bytes() == one
    assert (tmp_path / "three").read_bytes() == one


def test_tensors_begin_at_multiples_of_eight_bytes(tmp_path: Path) -> None:
    for length in range(8):
        name = "n" * (length + 1)
        write_safetensors(tmp_path / name, [TensorSpec(name, "F32", (1,))], [(name, torch.ones(1))])
        assert (len((tmp_path / name).read_bytes()) - 4) % 8 == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "never came: a"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "given twice"),
        ([("b", torch.ones(2))], "b: not among the specs"),
        ([("a", torch.ones(3))], "its spec says F32"),
        ([("a", torch.ones(2, dtype=torch.float64))], "its spec says F32"),
        ([("a", memoryview(b"12345"))], "5 bytes, its spec says 8"),
    ],
)
def test_tensors_that_are_not_the_specs_are_refused(
    tmp_path: Path, given: list[tuple[str, Tensor | memoryview]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x", [TensorSpec("a", "F32", (2,))], given)


def test_a_name_repeated_among_the_specs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="repeated"):
        write_safetensors(tmp_path / "x", [TensorSpec("a", "F32", (2,))] * 2, [])


def test_one_tensor_is_held_at_a_time(tmp_path: Path) -> None:
    """The writer asks for a tensor only once the one before it is in the file."""
    path = tmp_path / "x"
    sizes = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            sizes.append(path.stat().st_size)
            yield name, torch.ones(100)

    write_safetensors(path, [TensorSpec(name, "F32", (100,)) for name in "abc"], stream())
    assert list(np.diff(sizes)) == [400, 400]


@pytest.mark.usefixtures("umask_022")
def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", SPECS, TENSORS.items())
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644
