"""Reading safetensors files: the header is checked whole before a single tensor is believed.

The format: https://github.com/huggingface/safetensors#format. Eight bytes of length, a JSON header, then one block of
bytes that the tensors tile without holes. Files are mapped, not loaded; nothing here executes what a file holds.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import reprlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import torch
from torch import Tensor

from personalized_soups.errors import FileFormatError, InputError, choose_from
from personalized_soups.files.regular import check_no_lfs_pointer, opened, unreadable

# The reference implementation refuses longer headers, too.
MAX_HEADER_BYTES = 100_000_000

# Bits per element. Types that torch lacks can still be copied, byte for byte.
BITS: Mapping[str, int] = MappingProxyType({
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
})  # fmt: skip

TORCH_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "C64": torch.complex64,
    }
)

PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})

# A private mapping is writable memory to torch (which warns of read-only buffers) and never writes to the file.
# Without MAP_NORESERVE Linux would refuse to map a file that is larger than its memory in this way.
_NORESERVE = 0x4000 if sys.platform == "linux" else 0


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: `start` and `end` count bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, eq=False, slots=True)
class SafetensorsFile:
    """A mapped file with a checked header. `entries` stand in the order in which their bytes stand in the file.

    `data` is the block of all tensors' bytes. A file that somebody cuts while it is mapped kills the process that reads
    the missing pages (SIGBUS), as everywhere: files are replaced by a rename, as this package does, never in place.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    data: memoryview
    _inode: tuple[int, int]

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Map `path` and check its header; no tensor's bytes are read.

        Raises:
            FileFormatError: if the file is a pickle, truncated, or its header lies.
            InputError: if it cannot be read.
        """
        path = Path(path)
        check_no_pickle(path)
        with opened(path) as descriptor:
            status = os.fstat(descriptor)
            size = status.st_size
            if size < 8:
                raise _fault(path, f"the file is truncated: {size} bytes, a header needs at least 8")
            try:
                view = memoryview(_map(descriptor, size))
            except (OSError, ValueError) as error:  # ValueError: the file was cut between the two calls
                raise unreadable(path, error) from error
        length = int.from_bytes(view[:8], "little")
        if length > MAX_HEADER_BYTES:
            raise _fault(path, f"the header claims {length} bytes, more than the format allows ({MAX_HEADER_BYTES})")
        if length > size - 8:
            raise _fault(path, f"the header claims {length} bytes, the file has {size - 8} after its length")
        entries, metadata = _parse(bytes(view[8 : 8 + length]), size - 8 - length, path)
        inode = (status.st_dev, status.st_ino)
        return cls(path, MappingProxyType(entries), MappingProxyType(metadata), view[8 + length :], inode)

    @contextmanager
    def reopened(self) -> Iterator[int | None]:
        """Yield a descriptor of the file that is mapped, or None where its path leads to it no more."""
        with ExitStack() as stack:
            try:
                descriptor = stack.enter_context(opened(self.path))
            except InputError:
                yield None
                return
            status = os.fstat(descriptor)
            yield descriptor if (status.st_dev, status.st_ino) == self._inode else None

    def raw(self, name: str) -> memoryview:
        """Return the bytes of one tensor as they stand in the file, without a copy."""
        entry = self.entry(name)
        return self.data[entry.start : entry.end]

    def tensor(self, name: str) -> Tensor:
        """Return one tensor on the CPU, in the file's own shape and dtype.

        It shares the file's mapped pages where its place in the file is aligned (a copy is made where not); writing
        to it changes neither the file nor what others read from it later, except through this same object.

        Raises:
            FileFormatError: if torch has no such dtype.
        """
        entry = self.entry(name)
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise FileFormatError(
                f"{name}: torch has no dtype for {entry.dtype}",
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
        """Return where one tensor stands.

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
        """Bytes before the first tensor: the length and the header."""
        return self.num_bytes - len(self.data)

    @property
    def num_bytes(self) -> int:
        """The file's size."""
        mapped = self.data.obj
        assert isinstance(mapped, mmap.mmap)
        return len(mapped)


def check_no_pickle(path: Path) -> None:
    """Raise if `path` is a pickle by its name: loading one can run any code.

    Raises:
        FileFormatError: with the command that converts it.
    """
    if path.suffix.lower() in PICKLES:
        converted = path.with_name(path.stem.replace("pytorch_model", "model") + ".safetensors")
        raise FileFormatError(
            f"{path.name} is a pickle, which can run any code when it is loaded; it was not opened",
            where=str(path),
            mend='convert it, if you trust its source: python -c "import sys, torch, safetensors.torch as s; '
            "s.save_file({k: v.clone().contiguous() for k, v in torch.load(sys.argv[1], weights_only=True).items()}, "
            f"sys.argv[2])\" '{path}' '{converted}'",
        )


def shown(name: str) -> str:
    """Return a name out of a file as a message can hold it: what could steer or fill a terminal is quoted and cut."""
    return name if name.isprintable() and len(name) <= 300 else ascii(name[:300])


def parse_json(data: bytes, path: Path, *, constants: bool = False) -> Any:
    """Return what JSON bytes say; repeated keys are refused.

    Args:
        data: the file's bytes.
        path: where they come from, for errors.
        constants: take NaN and Infinity, which are no JSON and which transformers writes into config.json all the same.

    Raises:
        FileFormatError: naming the fault.
    """
    check_no_lfs_pointer(data, path)
    try:
        parsed = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_no_repeats,
            parse_constant=float if constants else _refuse_constant,
        )
        if b"\\u" in data:  # the only way in for half a surrogate pair, which no file could be written with
            json.dumps(parsed, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise _fault(path, f"not UTF-8: byte 0x{data[error.start]:02x} at {error.start}") from None
    except UnicodeEncodeError as error:
        raise _fault(path, f"not Unicode: {error.reason}") from None
    except (ValueError, RecursionError) as error:
        raise _fault(path, f"not JSON: {str(error)[:200]}") from None
    return parsed


def _map(descriptor: int, size: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(descriptor, size, access=mmap.ACCESS_COPY)
    return mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE | _NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE)


def _parse(header: bytes, data_bytes: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    parsed = parse_json(header, path)
    if not isinstance(parsed, dict):
        raise _fault(path, f"the header is a {type(parsed).__name__}, not an object")
    metadata = parsed.pop("__metadata__", None)
    if metadata is None:  # safetensors reads null as an absent table
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _fault(path, "__metadata__ is not a table of strings")
    entries = sorted((_entry(name, fields, path) for name, fields in parsed.items()), key=lambda e: (e.start, e.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a hole before it"
            raise _fault(path, f"{shown(entry.name)}: starts at byte {entry.start}, expected {position}: it {kind}")
        position = entry.end
    if position != data_bytes:
        kind = "is truncated" if position > data_bytes else "has bytes that belong to no tensor"
        raise _fault(path, f"the tensors take {position} bytes, the file holds {data_bytes}: it {kind}")
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, fields: Any, path: Path) -> TensorEntry:
    told = shown(name)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise _fault(path, f"{told}: an entry is dtype, shape and data_offsets, this is {reprlib.repr(fields)}")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise _fault(path, f"{told}: unknown dtype {reprlib.repr(dtype)}")
    # torch counts the elements without those sizes that are 0, too
    if not _are_sizes(shape) or math.prod(size for size in shape if size) >= 1 << 63:
        raise _fault(path, f"{told}: the shape is not a list of sizes: {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _fault(path, f"{told}: data_offsets are not a begin and an end: {reprlib.repr(offsets)}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise _fault(
            path,
            f"{told}: {dtype} {shape} takes {bits / 8:g} bytes, its data_offsets span {offsets[1] - offsets[0]}",
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    # a bool is an int to Python; sizes above 2^63 could not be addressed and only make the arithmetic slow
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(number) is int and 0 <= number < 1 << 63 for number in value)
    )


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the name {shown(repeated)!r} is repeated")
    return table


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")


def _fault(path: Path, what: str) -> FileFormatError:
    return FileFormatError(what, where=str(path), mend="the file is damaged or incomplete: download or write it again")
