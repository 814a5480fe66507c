"""Read safetensors files (https://github.com/huggingface/safetensors#format).

The whole header is checked before any tensor is read. Files are mapped into memory, not loaded. Reading a file never
runs code from it.
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

# Files are mapped writable, because torch warns about read-only buffers. The mapping is private, so writing to it does
# not change the file. Without MAP_NORESERVE, Linux would not map a file that is larger than the memory in this way.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True, eq=False, slots=True)
class SafetensorsFile:
    """A safetensors file that is mapped into memory and whose header was checked.

    If another process truncates the file while it is mapped, reading the missing pages kills this process (SIGBUS). So
    do not overwrite a file in place. Write a new file and rename it, as this package does.

    Attributes:
        path: the file.
        entries: the header's entry of each tensor, by the tensor's name, sorted by offset.
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
        """Map the file `path` into memory and check its header. The bytes of the tensors are not read.

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
        """Yield a new file descriptor of the mapped file, or None if its path now leads to another file or to none."""
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

        The tensor shares memory with the mapped file if its offset is aligned to its dtype. Otherwise it is a copy.
        Writing to a tensor that shares memory does not change the file, but later calls return the changed values.

        Raises:
            FileFormatError: if the file has no such tensor, or torch does not have its dtype.
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
        """Return the header's entry of one tensor.

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
        """The number of bytes before the first tensor: the header and the eight bytes with its length."""
        return self.num_bytes - len(self.data)

    @property
    def num_bytes(self) -> int:
        """The size of the file in bytes."""
        mapped = self.data.obj
        assert isinstance(mapped, mmap.mmap)
        return len(mapped)


def _map(descriptor: int, size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
