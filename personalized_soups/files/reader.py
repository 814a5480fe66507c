"""Reading safetensors files (https://github.com/huggingface/safetensors#format).

The whole header is checked before any tensor is read. Files are mapped into memory, not loaded, and no code in a file
is ever run.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Self

import torch
from torch import Tensor

from personalized_soups.errors import FileFormatError, InputError, choose_from
from personalized_soups.files.header import MAX_HEADER_BYTES, TORCH_DTYPES, TensorEntry, parse_header
from personalized_soups.files.pickles import check_no_pickle
from personalized_soups.files.regular import opened, unreadable
from personalized_soups.files.strict_json import damaged

# A private mapping is writable, since torch warns about read-only buffers, but never changes the file. Without
# MAP_NORESERVE, Linux would refuse to map a file larger than its memory in this way.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True, eq=False, slots=True)
class SafetensorsFile:
    """A mapped file with a checked header.

    If another process truncates the file while it is mapped, reading the missing pages kills this process (SIGBUS).
    Replace files by a rename, as this package does, never in place.

    Attributes:
        path: the file.
        entries: the tensors by name, in the order of their bytes in the file.
        metadata: the header's `__metadata__`.
        data: the bytes of all tensors.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data: memoryview
    _inode: tuple[int, int]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map `path` and check its header. No tensor's bytes are read.

        Raises:
            FileFormatError: if the file is a pickle, is truncated, or has an invalid header.
            InputError: if the file cannot be read.
        """
        path = Path(path)
        check_no_pickle(path)
        with opened(path) as descriptor:
            status = os.fstat(descriptor)
            size = status.st_size
            if size < 8:
                raise damaged(path, f"the file is truncated: it has {size} bytes, but a header needs at least 8")
            try:
                view = memoryview(_map(descriptor, size))
            except (OSError, ValueError) as error:  # ValueError: the file was truncated after fstat
                raise unreadable(path, error) from error
        length = int.from_bytes(view[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise damaged(
                path, f"the header claims to have {length} bytes, but the format allows at most {MAX_HEADER_BYTES}"
            )
        if length > size - 8:
            raise damaged(path, f"the header claims to have {length} bytes, but only {size - 8} bytes are left")
        entries, metadata = parse_header(bytes(view[8 : 8 + length]), size - 8 - length, path)
        inode = (status.st_dev, status.st_ino)
        return cls(path, MappingProxyType(entries), MappingProxyType(metadata), view[8 + length :], inode)

    @contextmanager
    def reopened(self) -> Iterator[int | None]:
        """Yield a descriptor of the mapped file, or None if another file is at its path by now."""
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(opened(self.path))
            except InputError:
                yield None
                return
            status = os.fstat(descriptor)
            yield descriptor if (status.st_dev, status.st_ino) == self._inode else None

    def raw(self, name: str) -> memoryview:
        """Return the stored bytes of one tensor, without a copy."""
        entry = self.entry(name)
        return self.data[entry.start : entry.end]

    def tensor(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in the shape and dtype of the file.

        The tensor shares the file's mapped pages if its offset is aligned, and is a copy otherwise. Writing to it does
        not change the file. It does change what this object returns for the same tensor later.

        Raises:
            FileFormatError: if torch has no such dtype.
        """
        entry = self.entry(name)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise FileFormatError(
                f"tensor {name!r} has dtype {entry.dtype}, which does not exist in torch",
                where=str(self.path),
                mend="convert the tensor to float32, float16 or bfloat16",
            )
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        offset = self.header_bytes + entry.start
        buffer: memoryview | bytearray = self.raw(name)
        if offset % dtype.itemsize:
            buffer = bytearray(buffer)
        return torch.frombuffer(buffer, dtype=dtype).reshape(entry.shape)

    def entry(self, name: str) -> TensorEntry:
        """Return the entry of one tensor.

        Raises:
            FileFormatError: if the file has no such tensor.
        """
        try:
            return self.entries[name]
        except KeyError:
            raise FileFormatError(
                f"the file has no tensor {name!r}", where=str(self.path), mend=choose_from(name, self.entries)
            ) from None

    @property
    def header_bytes(self) -> int:
        """The number of bytes before the first tensor: the length and the header."""
        return self.num_bytes - len(self.data)

    @property
    def num_bytes(self) -> int:
        """The size of the file."""
        mapped = self.data.obj
        assert isinstance(mapped, mmap.mmap)
        return len(mapped)


def _map(descriptor: int, size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
