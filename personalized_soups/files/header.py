"""The header of a safetensors file: https://github.com/huggingface/safetensors#format.

A safetensors file starts with eight bytes that hold the length of the header. The header follows: a JSON object with an
entry for each tensor. The bytes of the tensors follow without gaps.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from personalized_soups.files.strict_json import damaged, parse_json, shown

# The limit of the reference implementation.
MAX_HEADER_BYTES = 100_000_000

# Bits per element of every dtype of the format. Tensors whose dtype torch does not have can still be copied.
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


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """The header's entry of one tensor.

    Attributes:
        name: the tensor's name.
        dtype: the dtype's name in the format, such as `BF16`.
        shape: the tensor's shape.
        start: the offset of the tensor's first byte, counted from the end of the header.
        end: the offset just after the tensor's last byte, counted from the end of the header.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def parse_header(header: bytes, data_bytes: int, path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Check a header, and return its entries by name, sorted by offset, and its metadata.

    Args:
        header: the JSON text of the header.
        data_bytes: the number of bytes after the header.
        path: the file, which error messages name.

    Raises:
        FileFormatError: if the header is not valid, or if the tensors do not exactly fill the bytes after the header.
    """
    parsed = parse_json(header, path)
    if not isinstance(parsed, dict):
        raise damaged(path, f"the header must be a JSON object, but it is a {type(parsed).__name__}")
    metadata = parsed.pop("__metadata__", None)
    if metadata is None:  # the reference implementation accepts null
        metadata = {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged(path, "the header's __metadata__ must map strings to strings")
    entries = sorted((_entry(name, fields, path) for name, fields in parsed.items()), key=lambda e: (e.start, e.end))
    position = 0
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the tensor before it" if entry.start < position else "leaves a gap before it"
            raise damaged(
                path,
                f"tensor {shown(entry.name)} must start at byte {position}, but starts at {entry.start}: it {kind}",
            )
        position = entry.end
    if position != data_bytes:
        kind = "is truncated" if position > data_bytes else "has bytes after the last tensor"
        raise damaged(
            path, f"the header describes {position} bytes of tensors, but the file has {data_bytes}: it {kind}"
        )
    return {entry.name: entry for entry in entries}, metadata


def _entry(name: str, fields: Any, path: Path) -> TensorEntry:
    text = shown(name)
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise damaged(
            path,
            f"the entry of tensor {text} must have dtype, shape and data_offsets, but it is {reprlib.repr(fields)}",
        )
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise damaged(path, f"tensor {text} has the unknown dtype {reprlib.repr(dtype)}")
    # Sizes of 0 are skipped, because torch computes strides from the other sizes, whose product must fit into int64.
    if not _are_sizes(shape) or math.prod(size for size in shape if size) >= 1 << 63:
        raise damaged(path, f"the shape of tensor {text} is not a valid list of sizes: {reprlib.repr(shape)}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(path, f"the data_offsets of tensor {text} are not a start and an end: {reprlib.repr(offsets)}")
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (offsets[1] - offsets[0]):
        raise damaged(
            path,
            f"tensor {text} has dtype {dtype} and shape {shape}, so it needs {bits / 8:g} bytes, "
            f"but its data_offsets span {offsets[1] - offsets[0]} bytes",
        )
    return TensorEntry(name, dtype, tuple(shape), offsets[0], offsets[1])


def _are_sizes(value: Any) -> bool:
    # type() instead of isinstance: a bool is an int in Python. Larger sizes cannot be addressed, and huge numbers would
    # only make the arithmetic slow.
    return (
        isinstance(value, list)
        and len(value) <= 64
        and all(type(number) is int and 0 <= number < 1 << 63 for number in value)
    )
