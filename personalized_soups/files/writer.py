"""Writing safetensors files: the header first, then each tensor at its known place as it comes."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from personalized_soups.files.reader import BITS, TORCH_DTYPES

NAMES_OF_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor that a file will hold."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes that it takes in the file."""
        return math.prod(self.shape) * BITS[self.dtype] // 8


def write_safetensors(
    path: Path,
    specs: Sequence[TensorSpec],
    tensors: Iterable[tuple[str, Tensor | memoryview]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a new file whose tensors stand in the order of `specs`; `tensors` may come in any order.

    Memory: one tensor at a time. The file's mode follows the umask.

    Args:
        path: the file; it must not be there.
        specs: every tensor's name, dtype (the format's own name, such as `BF16`) and shape.
        tensors: each name once, with a tensor on any device, or with the bytes as they shall stand.
        metadata: the header's `__metadata__`.

    Raises:
        ValueError: if a tensor is missing, repeated, unknown, or not what its spec says.
        OSError: if writing fails.
    """
    header = _header(specs, metadata or {})
    left = {}
    position = len(header)
    for spec in specs:
        left[spec.name] = (spec, position)
        position += spec.num_bytes
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    try:
        _write_at(descriptor, memoryview(header), 0)
        for name, tensor in tensors:
            if name not in left:
                raise ValueError(f"{name}: not among the specs, or given twice")
            spec, place = left.pop(name)
            _write_at(descriptor, _checked_bytes(tensor, spec), place)
        if left:
            raise ValueError(f"tensors that never came: {', '.join(sorted(left)[:3])} ({len(left)} in all)")
        os.ftruncate(descriptor, position)
    finally:
        os.close(descriptor)


def spec_of(name: str, tensor: Tensor) -> TensorSpec:
    """Return the spec of a tensor as it is."""
    return TensorSpec(name, NAMES_OF_DTYPES[tensor.dtype], tuple(tensor.shape))


def _header(specs: Sequence[TensorSpec], metadata: Mapping[str, str]) -> bytes:
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for spec in specs:
        if spec.name in table:
            raise ValueError(f"{spec.name}: repeated among the specs")
        end = position + spec.num_bytes
        table[spec.name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes, as the reference writer has it
    return len(text).to_bytes(8, "little") + text


def _checked_bytes(tensor: Tensor | memoryview, spec: TensorSpec) -> memoryview:
    if isinstance(tensor, memoryview):
        data = tensor.cast("B") if tensor.format != "B" else tensor
        if data.nbytes != spec.num_bytes:
            raise ValueError(f"{spec.name}: {data.nbytes} bytes, its spec says {spec.num_bytes}")
        return data
    if spec_of(spec.name, tensor) != spec:
        raise ValueError(f"{spec.name}: {tensor.dtype} {tuple(tensor.shape)}, its spec says {spec.dtype} {spec.shape}")
    if tensor.numel() == 0:
        return memoryview(b"")
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return flat.numpy().data


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):  # a write may be cut short, by a signal or at 2 GiB
        done += os.pwrite(descriptor, data[done:], place + done)
