from __future__ import annotations

import errno
import itertools
import os
import random
import stat
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from personalized_soups.errors import FileFormatError
from personalized_soups.files import writer as writer_module
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.writer import SafetensorsWriter, TensorSpec, spec_of, write_safetensors
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
        ([], "not given: a"),
        ([("a", torch.ones(2)), ("a", torch.ones(2))], "'a' is not in the specs, or was given twice"),
        ([("b", torch.ones(2))], "'b' is not in the specs"),
        ([("a", torch.ones(3))], "but its spec declares F32"),
        ([("a", torch.ones(2, dtype=torch.float64))], "but its spec declares F32"),
        ([("a", memoryview(b"12345"))], "but its spec needs 8 bytes"),
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
    ones_so_far = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in "abc":
            ones_so_far.append(np.frombuffer(path.read_bytes()[-1200:], "<f4").sum())
            yield name, torch.ones(100)

    write_safetensors(path, [TensorSpec(name, "F32", (100,)) for name in "abc"], stream())
    assert ones_so_far == [0, 100, 200]


@pytest.mark.usefixtures("umask_022")
def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "x", SPECS, TENSORS.items())
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o644


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def written_in_parts(path: Path, seed: int, num_threads: int) -> None:
    """Write TENSORS in parts of random lengths, in random order, from several threads."""
    dice = random.Random(seed)
    parts = []
    for name, tensor in TENSORS.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
        cuts = sorted({0, len(data), *(dice.randrange(len(data)) for _ in range(3) if len(data))})
        parts += [(name, data[begin:end], begin) for begin, end in itertools.pairwise(cuts)]
    dice.shuffle(parts)
    with SafetensorsWriter(path, SPECS) as writer, ThreadPoolExecutor(num_threads) as pool:
        list(pool.map(lambda part: writer.write(*part), parts))


@pytest.mark.parametrize("seed", range(20))
def test_parts_in_any_order_from_several_threads_give_the_same_bytes(tmp_path: Path, seed: int) -> None:
    write_safetensors(tmp_path / "whole", SPECS, TENSORS.items())
    written_in_parts(tmp_path / "parts", seed, num_threads=1 + seed % 4)
    assert (tmp_path / "parts").read_bytes() == (tmp_path / "whole").read_bytes()


def test_rows_of_a_tensor_are_taken(tmp_path: Path) -> None:
    rows = torch.arange(12, dtype=torch.float32).reshape(4, 3)
    with SafetensorsWriter(tmp_path / "x", [spec_of("a", rows)]) as writer:
        writer.write("a", rows[2:], start=2 * 3 * 4)
        writer.write("a", rows[:2])
    assert torch.equal(safetensors.torch.load_file(tmp_path / "x")["a"], rows)


def write_parts(path: Path, specs: list[TensorSpec], *parts: tuple[str, Tensor | memoryview, int]) -> None:
    with SafetensorsWriter(path, specs) as writer:
        for part in parts:
            writer.write(*part)


def test_places_beyond_four_gibibytes_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Places that 32 bits do not count, in a file of holes."""
    monkeypatch.setattr(writer_module, "allocate", lambda *_: False)
    far = 5 << 30
    writer = SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (far,))]).__enter__()
    writer.write("a", memoryview(b"z"), start=far - 1)
    with (tmp_path / "x").open("rb") as file:
        assert file.seek(-2, os.SEEK_END) > far
        assert file.read() == b"\0z"
    writer.__exit__(KeyboardInterrupt, KeyboardInterrupt(), None)
    assert left_in(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "data", "start", "message"),
    [
        ("b", torch.ones(1), 0, "not in the specs"),
        ("a", torch.ones(2, 3), 8, "24 bytes at offset 8 do not fit into it"),
        ("a", torch.ones(1), -4, "at offset -4"),
        ("a", torch.ones(3, 2), 0, "but its spec declares F32"),
        ("a", torch.ones(2, 3, dtype=torch.float16), 0, "but its spec declares F32"),
        ("a", memoryview(b"12345678"), 8, "written twice"),
        ("a", memoryview(b"1234"), 0, "written twice"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_and_leaves_no_file(
    tmp_path: Path, name: str, data: Tensor | memoryview, start: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_parts(
            tmp_path / "x",
            [TensorSpec("a", "F32", (2, 3))],
            ("a", memoryview(b"1234"), 0),
            ("a", memoryview(b"87654321"), 4),
            (name, data, start),
        )
    assert left_in(tmp_path) == []


@pytest.mark.parametrize("missing", range(0, 24, 4))
def test_a_file_with_a_gap_is_refused_at_the_end(tmp_path: Path, missing: int) -> None:
    specs = [TensorSpec("a", "F32", (2, 3)), TensorSpec("b", "F32", (1,))]
    given = [("a", memoryview(b"1234"), start) for start in range(0, 24, 4) if start != missing]
    with pytest.raises(ValueError, match=r"not written completely: a \(1 in total"):
        write_parts(tmp_path / "x", specs, ("b", torch.ones(1), 0), *given)
    assert left_in(tmp_path) == []


def test_no_reader_takes_a_file_that_is_half_written(tmp_path: Path) -> None:
    with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F32", (1,))]) as writer:
        writer.write("a", torch.ones(1))
        with pytest.raises(FileFormatError):
            SafetensorsFile.open(tmp_path / "x")
        with pytest.raises(safetensors.SafetensorError):
            safetensors.torch.load_file(tmp_path / "x")
    assert SafetensorsFile.open(tmp_path / "x").tensor("a").tolist() == [1]
    with pytest.raises(ValueError, match="not open"):
        writer.write("a", torch.ones(1))


def write_beside(pool: ThreadPoolExecutor, path: Path) -> None:
    """Write a file of one tensor in another thread, whose result nobody asks for."""
    with SafetensorsWriter(path, [TensorSpec("a", "F32", (1,))]) as writer:
        pool.submit(writer.write, "a", torch.ones(1))


def test_a_write_that_fails_in_a_thread_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        time.sleep(0.1)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(writer_module, "write_at", fail)
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=r"a write failed|not written"):
        write_beside(pool, tmp_path / "x")
    assert left_in(tmp_path) == []


def test_the_file_stays_open_until_writes_in_other_threads_are_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A descriptor closed under a writing thread may be another file's by the time it writes."""
    began, outcomes = threading.Event(), []

    def slowly(descriptor: int, data: memoryview, place: int) -> None:
        began.set()
        time.sleep(0.2)
        outcomes.append(os.pwrite(descriptor, data, place))  # EBADF where it was closed

    def interrupted(pool: ThreadPoolExecutor) -> None:
        with SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "F32", (1,))]) as writer:
            pool.submit(writer.write, "a", torch.ones(1))
            assert began.wait()
            raise KeyboardInterrupt

    monkeypatch.setattr(writer_module, "write_at", slowly)
    with ThreadPoolExecutor(1) as pool:
        with pytest.raises(KeyboardInterrupt):
            interrupted(pool)
        assert outcomes == [4]
    assert left_in(tmp_path) == []


def scattered_source(folder: Path) -> SafetensorsFile:
    tensors = {f"t{index}": torch.full((index + 1, 5), index, dtype=torch.float32) for index in range(6)}
    write_safetensors(folder / "source", [spec_of(*item) for item in tensors.items()], tensors.items(), {"k": "v"})
    return SafetensorsFile.open(folder / "source")


@pytest.mark.parametrize("way", ["kernel", "no such call", "replaced"])
def test_tensors_are_copied_byte_for_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    source = scattered_source(tmp_path)
    order = ["t4", "t1", "t2", "t3", "t0"]  # t1, t2 and t3 are neighbours on both sides: one run
    lengths: list[int] = []

    def copying(reading: int, writing: int, count: int, start: int, begin: int) -> int:
        if way == "no such call":
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        lengths.append(count)
        os.pwrite(writing, os.pread(reading, count, start), begin)
        return count

    monkeypatch.setattr(os, "copy_file_range", copying)
    if way == "replaced":  # another file is at the path: the bytes must come from the checked one
        (tmp_path / "other").write_bytes(b"x" * source.num_bytes)
        (tmp_path / "other").replace(source.path)
    specs = [TensorSpec(name, "F32", source.entry(name).shape) for name in order]
    with SafetensorsWriter(tmp_path / "x", specs) as writer:
        writer.copy(["t0", "t3", "t1", "t2"], source)
        writer.copy(["t4"], source)
    read = safetensors.torch.load_file(tmp_path / "x")
    assert {name: tensor.unique().tolist() for name, tensor in read.items()} == {n: [int(n[1])] for n in order}
    assert lengths == ([180, 20, 100] if way == "kernel" else [])


def test_neighbours_in_the_source_alone_are_no_run(tmp_path: Path) -> None:
    source = scattered_source(tmp_path)
    specs = [TensorSpec(name, "F32", source.entry(name).shape) for name in ("t1", "t4", "t2")]
    with SafetensorsWriter(tmp_path / "x", specs) as writer:
        writer.copy(["t1", "t2"], source)
        writer.copy(["t4"], source)
    read = safetensors.torch.load_file(tmp_path / "x")
    assert {name: tensor.unique().tolist() for name, tensor in read.items()} == {"t1": [1], "t2": [2], "t4": [4]}


def test_the_kernel_copies_for_real(tmp_path: Path) -> None:
    source = scattered_source(tmp_path)
    specs = [TensorSpec(entry.name, entry.dtype, entry.shape) for entry in source.entries.values()]
    with SafetensorsWriter(tmp_path / "x", specs, {"k": "v"}) as writer:
        writer.copy(source.entries, source)
    assert (tmp_path / "x").read_bytes() == source.path.read_bytes()


def test_a_tensor_of_another_shape_is_not_copied(tmp_path: Path) -> None:
    source = scattered_source(tmp_path)
    with (
        pytest.raises(ValueError, match=r"shape \(1, 5\) in the source, but its spec declares F32 \(5, 1\)"),
        SafetensorsWriter(tmp_path / "x", [TensorSpec("t0", "F32", (5, 1))]) as writer,
    ):
        writer.copy(["t0"], source)
    assert not (tmp_path / "x").exists()


def test_a_disk_without_room_is_found_before_the_work(tmp_path: Path) -> None:
    too_much = 1 << 62  # a size near the disk's would take all free space for a moment, from other tests too
    with pytest.raises(OSError, match=r"No space left|File too large") as caught:
        SafetensorsWriter(tmp_path / "x", [TensorSpec("a", "U8", (too_much,))]).__enter__()
    assert caught.value.errno in {errno.ENOSPC, errno.EFBIG}
    assert not (tmp_path / "x").exists()
