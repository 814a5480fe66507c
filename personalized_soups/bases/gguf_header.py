"""Read the header of a GGUF file: its metadata, and the type, shape and place of every tensor.

`gguf.GGUFReader` makes several NumPy arrays for every token of the vocabulary, which takes seconds. This reader skips
arrays of strings until they are asked for, and checks that the file is long enough for all that its header promises.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. A file has a magic number, a version, the counts of
tensors and of metadata, the metadata, the table of tensors, and then the tensors, aligned.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.errors import FileFormatError
from personalized_soups.files.regular import opened, unreadable
from personalized_soups.files.strict_json import shown

MAGIC = b"GGUF"

# Version 1 counted with 32 bits. llama.cpp no longer reads it.
_VERSIONS = (2, 3)
_ALIGNMENT = "general.alignment"
_MAX_DIMS = 4

# struct's format for each type of a metadata value; 8 is a string and 9 is an array
_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: the name in the file, such as `blk.0.attn_q.weight`.
        type_id: ggml's number for the type of the values, such as 3 for Q4_1.
        shape: the shape, outermost dimension first, as in torch.
        start: the offset of the first byte in the file.
    """

    name: str
    type_id: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class TextArray:
    """Where an array of strings is in a GGUF file.

    Attributes:
        start: the offset of the first string's length.
        length: the number of strings.
    """

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """The header of a GGUF file.

    Attributes:
        path: the file.
        num_bytes: the size of the file.
        metadata: the values by key. An array of strings is a `TextArray`, which `texts` reads.
        tensors: the tensors by name, in the order of the file.
    """

    path: Path
    num_bytes: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Read the header of a file.

        Raises:
            FileFormatError: if the file is not a GGUF file of version 2 or 3, or ends within its header.
            InputError: if the file cannot be read.
        """
        with opened(path) as descriptor:
            try:
                size = os.fstat(descriptor).st_size
                if size < len(MAGIC):
                    raise _not_gguf(path, os.read(descriptor, len(MAGIC)))
                with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as data:
                    return _read(path, data)
            except OSError as error:
                raise unreadable(path, error) from error

    def texts(self, key: str) -> list[str] | None:
        """Return the strings of an array of the metadata, or None if no array of strings has this key.

        Raises:
            FileFormatError: if a string is not UTF-8.
            InputError: if the file cannot be read.
        """
        array = self.metadata.get(key)
        if not isinstance(array, TextArray):
            return None
        with opened(self.path) as descriptor, mmap.mmap(descriptor, self.num_bytes, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(self.path, data, array.start)
            return [cursor.text() for _ in range(array.length)]

    @property
    def architecture(self) -> str:
        """The name of the architecture, such as `llama`.

        Raises:
            FileFormatError: if the header has no architecture.
        """
        name = self.metadata.get("general.architecture")
        if not isinstance(name, str):
            raise FileFormatError(
                "the header has no general.architecture",
                where=str(self.path),
                mend="write the file again with llama.cpp's convert_hf_to_gguf.py",
            )
        return name

    def of_architecture(self, key: str, default: Any = None) -> Any:
        """Return the value of a key of the architecture, such as `block_count`, or `default` if there is none."""
        return self.metadata.get(f"{self.architecture}.{key}", default)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins with GGUF's magic number. A file that cannot be read does not."""
    try:
        with path.open("rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def truncated(path: Path, size: int, needed: int) -> FileFormatError:
    """Return an error which says that a file has fewer bytes than its header needs."""
    return FileFormatError(
        f"the GGUF file is truncated: it has {size} bytes, but its header needs at least {needed}",
        where=str(path),
        mend="download or copy the file again",
    )


def _not_gguf(path: Path, start: bytes) -> FileFormatError:
    return FileFormatError(
        f"the file is not a GGUF file: it begins with {start!r} instead of {MAGIC!r}",
        where=str(path),
        mend="give a GGUF file, or the folder of a model (config.json, safetensors, tokenizer)",
    )


def _read(path: Path, data: mmap.mmap) -> GgufHeader:
    if data[:4] != MAGIC:
        raise _not_gguf(path, data[:4])
    cursor = _Cursor(path, data)
    version = cursor.number("I")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
        raise FileFormatError(
            "the GGUF file is big-endian" if swapped else f"the GGUF file has the version {version}",
            where=str(path),
            mend="give a little-endian GGUF file of version 2 or 3, as llama.cpp writes it",
        )
    num_tensors, num_values = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(num_values):
        key = cursor.text()
        metadata[key] = cursor.value(cursor.number("I"))
    table = [_entry(cursor) for _ in range(num_tensors)]
    alignment = metadata.get(_ALIGNMENT, 32)
    if not isinstance(alignment, int) or alignment <= 0:
        raise cursor.damaged(f"{_ALIGNMENT} is {alignment!r}")
    begin = -(-cursor.place // alignment) * alignment
    tensors = {name: GgufTensor(name, kind, shape, begin + offset) for name, kind, shape, offset in table}
    if len(tensors) != num_tensors:
        raise cursor.damaged("the name of a tensor is repeated")
    return GgufHeader(path, len(data), metadata, tensors)


def _entry(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    name = cursor.text()
    num_dims = cursor.number("I")
    if num_dims > _MAX_DIMS:
        raise cursor.damaged(f"the tensor {shown(name)!r} has {num_dims} dimensions")
    # ggml counts dimensions from the innermost
    shape = tuple(cursor.number("Q") for _ in range(num_dims))[::-1]
    if math.prod(shape) >= 1 << 48:
        raise cursor.damaged(f"the tensor {shown(name)!r} has the shape {shape}")
    return name, cursor.number("I"), shape, cursor.number("Q")


class _Cursor:
    """Reads values one after the other. It raises an error before it reads behind the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap, place: int = len(MAGIC)) -> None:
        self._path, self._data, self.place = path, data, place

    def number(self, form: str) -> Any:
        start = self._skip(struct.calcsize(form))
        return struct.unpack_from(f"<{form}", self._data, start)[0]

    def text(self) -> str:
        length = self.number("Q")
        start = self._skip(length)
        try:
            return self._data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"the text at byte {start} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            return self._array()
        if kind not in _FORMATS:
            raise self.damaged(f"a value has the unknown type {kind}")
        return self.number(_FORMATS[kind])

    def _array(self) -> Any:
        kind, length = self.number("I"), self.number("Q")
        if kind == _STRING:
            array = TextArray(self.place, length)
            for _ in range(length):
                self._skip(self.number("Q"))
            return array
        if kind not in _FORMATS:
            raise self.damaged(f"an array has values of the unknown type {kind}")
        form = _FORMATS[kind]
        start = self._skip(struct.calcsize(form) * length)
        return struct.unpack_from(f"<{length}{form}", self._data, start)

    def _skip(self, length: int) -> int:
        start = self.place
        self.place += length
        if self.place > len(self._data):
            raise truncated(self._path, len(self._data), self.place)
        return start

    def damaged(self, what: str) -> FileFormatError:
        return FileFormatError(
            f"the header of the GGUF file is damaged: {what}",
            where=str(self._path),
            mend="download or copy the file again",
        )
