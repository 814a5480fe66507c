"""Write safetensors files. Several threads can write tensors in any order, because all offsets are known in advance."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from personalized_soups.files.byte_ranges import ByteRanges
from personalized_soups.files.copies import copy_range, write_at
from personalized_soups.files.header import BITS, TORCH_DTYPES
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.files.syscalls import allocate

NAMES_OF_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """The name, dtype and shape of a tensor in a new file.

    Attributes:
        name: the tensor's name.
        dtype: the name of the dtype in the safetensors format, such as `BF16`.
        shape: the tensor's shape.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """The size of the tensor in the file, in bytes."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


class SafetensorsWriter:
    """Writes a new file that has the tensors in the order of `specs`. A thread-safe context manager.

    The file has its full size from the start, and the header is written last. Readers reject the file until the block
    has ended without an error. If the block raises an error, the file is removed. The file mode follows the umask. A
    contiguous CPU tensor is written without a copy in memory.

    Args:
        path: the file, which must not exist.
        specs: the name, dtype and shape of every tensor.
        metadata: the `__metadata__` of the header.

    Raises:
        ValueError: if a name is repeated in `specs`, or if some bytes of a tensor are not written when the block ends.
        OSError: if writing fails. If the disk is too full for the file, the start of the block raises this error.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSpec], metadata: Mapping[str, str] | None = None) -> None:
        self._path = path
        self._header = _header(specs, metadata or {})
        self._specs = {spec.name: spec for spec in specs}
        self._places: dict[str, int] = {}
        position = len(self._header)
        for spec in specs:
            self._places[spec.name] = position
            position += spec.num_bytes
        self._size = position
        self._descriptor = -1
        self._given = ByteRanges()
        self._busy = 0  # number of writes that are running; the descriptor stays open for them
        self._is_open = False
        self._has_failed = False
        self._changed = threading.Condition()

    def __enter__(self) -> Self:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self._path, flags, 0o666)
        try:
            # Reserving the space first is faster: on ext4 with two threads, a GiB takes 0.10 s instead of 0.17 s.
            if not allocate(self._descriptor, self._size):
                os.ftruncate(self._descriptor, self._size)
        except BaseException:
            self._drop()
            raise
        self._is_open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._is_open = False
            self._changed.wait_for(lambda: self._busy == 0)
        if error is not None:
            self._drop()
            return
        try:
            self._check_complete()
            write_at(self._descriptor, memoryview(self._header), 0)
            self._close()
        except BaseException:
            self._drop()
            raise

    def write(self, name: str, data: Tensor | memoryview, start: int = 0) -> None:
        """Write the tensor `name`, or a part of it.

        Args:
            name: the name of the tensor.
            data: the bytes to write, or a tensor on any device with the dtype of the spec. A tensor may be the whole
                tensor, some of its rows, or a flat part of its values. The writer keeps no reference to `data`.
            start: the offset in bytes, within the tensor, of the first byte of `data`.

        Raises:
            ValueError: if no spec has this name, if `data` does not match the spec, or if bytes are written twice.
            OSError: if writing fails.
        """
        spec = self._spec(name)
        view = _bytes_of(data, spec)
        if start < 0 or start + len(view) > spec.num_bytes:
            raise ValueError(
                f"tensor {name!r} has {spec.num_bytes} bytes, so {len(view)} bytes at offset {start} do not fit into it"
            )
        place = self._places[name] + start
        with self._writing(name, place, place + len(view)):
            write_at(self._descriptor, view, place)

    def copy(self, names: Iterable[str], source: SafetensorsFile) -> None:
        """Copy whole tensors from another file without changing their bytes.

        Tensors that are adjacent in both files are copied together. The kernel copies them if the file systems support
        it. Otherwise they are written from the mapped pages of `source`. Neither way needs additional memory.

        Raises:
            ValueError: if a tensor has no spec, if its spec differs from the source, or if a tensor is written twice.
            FileFormatError: if `source` does not contain one of the tensors.
            OSError: if reading or writing fails.
        """
        runs = self._runs(names, source)
        with source.reopened() as descriptor:
            for first, start, begin, length in runs:
                with self._writing(first, begin, begin + length):
                    place = source.header_bytes + start
                    if descriptor is None or not copy_range(descriptor, place, self._descriptor, begin, length):
                        write_at(self._descriptor, source.data[start : start + length], begin)

    def _runs(self, names: Iterable[str], source: SafetensorsFile) -> list[tuple[str, int, int, int]]:
        """Group the tensors into runs that are adjacent in both files, and return the runs.

        A run has four parts: the name of its first tensor, its offset in `source.data`, its offset in this file, and
        its length in bytes.
        """
        runs: list[tuple[str, int, int, int]] = []
        for name in sorted(names, key=lambda name: self._places.get(name, -1)):
            spec, entry = self._spec(name), source.entry(name)
            if (entry.dtype, entry.shape) != (spec.dtype, spec.shape):
                raise ValueError(
                    f"tensor {name!r} has dtype {entry.dtype} and shape {entry.shape} in the source, "
                    f"but its spec declares {spec.dtype} {spec.shape}"
                )
            place, length = self._places[name], spec.num_bytes
            if runs:
                first, start, begin, before = runs[-1]
                if start + before == entry.start and begin + before == place:
                    runs[-1] = (first, start, begin, before + length)
                    continue
            runs.append((name, entry.start, place, length))
        return runs

    @contextmanager
    def _writing(self, name: str, begin: int, end: int) -> Iterator[None]:
        with self._changed:
            if not self._is_open:
                raise ValueError(f"tensor {name!r} cannot be written: the file is not open")
            if not self._given.add(begin, end):
                raise ValueError(f"some bytes of tensor {name!r} were written twice")
            self._busy += 1
        is_done = False
        try:
            yield
            is_done = True
        finally:
            with self._changed:
                self._busy -= 1
                self._has_failed |= not is_done
                self._changed.notify_all()

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self._specs[name]
        except KeyError:
            raise ValueError(f"tensor {name!r} is not in the specs") from None

    def _check_complete(self) -> None:
        if self._has_failed:
            raise ValueError("a write failed, but its error was ignored")
        missing = [
            name
            for name, place in self._places.items()
            if not self._given.has(place, place + self._specs[name].num_bytes)
        ]
        if missing:
            raise ValueError(
                f"some tensors were not written completely: {', '.join(missing[:3])} ({len(missing)} in total)"
            )

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _drop(self) -> None:
        self._close()
        self._path.unlink(missing_ok=True)


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file that has the tensors in the order of `specs`. The file mode follows the umask.

    Args:
        path: the file, which must not exist.
        specs: the name, dtype and shape of every tensor.
        tensors: the name of each tensor with its values: a tensor on any device, or the bytes to write. The names may
            have any order. If `tensors` is a generator, only one tensor at a time is in memory.
        metadata: the `__metadata__` of the header.

    Raises:
        ValueError: if a tensor is missing, repeated, not in `specs`, or does not match its spec.
        OSError: if writing fails.
    """
    with SafetensorsWriter(path, specs, metadata) as writer:
        left = {spec.name: spec for spec in specs}
        for name, tensor in tensors:
            if name not in left:
                raise ValueError(f"tensor {name!r} is not in the specs, or was given twice")
            _check_whole(tensor, left.pop(name))
            writer.write(name, tensor)
        if left:
            raise ValueError(
                f"some tensors of the specs were not given: {', '.join(sorted(left)[:3])} ({len(left)} in total)"
            )


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Return a spec named `name` with the dtype and the shape of `tensor`."""
    return TensorSpec(name, NAMES_OF_DTYPES[tensor.dtype], tuple(tensor.shape))


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in specs:
        if spec.name in table:
            raise ValueError(f"the name {spec.name!r} is repeated in the specs")
        end = position + spec.num_bytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # as in the reference writer, tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _check_whole(tensor: Tensor | memoryview, spec: TensorSpec) -> None:
    if isinstance(tensor, memoryview):
        if tensor.nbytes != spec.num_bytes:
            raise ValueError(
                f"{tensor.nbytes} bytes were given for tensor {spec.name!r}, but its spec needs {spec.num_bytes} bytes"
            )
    elif spec_of(spec.name, tensor) != spec:
        raise ValueError(
            f"tensor {spec.name!r} was given with {tensor.dtype} and shape {tuple(tensor.shape)}, "
            f"but its spec declares {spec.dtype} {spec.shape}"
        )


def _bytes_of(data: Tensor | memoryview, spec: TensorSpec) -> memoryview:
    if isinstance(data, memoryview):
        return data.cast("B") if data.format != "B" or data.ndim != 1 else data
    trailing = tuple(data.shape[1:])
    if NAMES_OF_DTYPES.get(data.dtype) != spec.dtype or spec.shape[len(spec.shape) - len(trailing) :] != trailing:
        raise ValueError(
            f"tensor {spec.name!r} was given with {data.dtype} and shape {tuple(data.shape)}, "
            f"but its spec declares {spec.dtype} {spec.shape}"
        )
    if data.numel() == 0:
        return memoryview(b"")
    return data.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data
