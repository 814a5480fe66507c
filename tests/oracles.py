"""The slow truth: dense float64 NumPy from files alone. Shares no code with the package, and no library with it.

Safetensors files are read and written by hand (struct, json), bfloat16 is decoded by hand, a soup is a dense sum.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

_KINDS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "U8": "|u1"}
HALF_ULP = {"F32": 2.0**-24, "F16": 2.0**-11, "BF16": 2.0**-8}
SMALLEST = {"F32": 2.0**-149, "F16": 2.0**-24, "BF16": 2.0**-133}

# What `git clone` leaves of a file that Git LFS keeps, where git-lfs is not installed.
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 12345\n"
)


def read_tensors(path: Path) -> dict[str, Matrix]:
    """Return every tensor of a safetensors file in float64."""
    header, data = split_file(path)
    return {name: _decode(entry, data) for name, entry in header.items() if name != "__metadata__"}


def split_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the data of a safetensors file."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    return header, content[8 + length :]


def raw_tensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return dtype, shape and bytes of every tensor, in their order in the file."""
    header, data = split_file(path)
    header.pop("__metadata__", None)
    ordered = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {
        name: (entry["dtype"], tuple(entry["shape"]), data[slice(*entry["data_offsets"])]) for name, entry in ordered
    }


def write_tensors(
    path: Path, tensors: Mapping[str, tuple[str, Any]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file from `name -> (dtype, values)`; bfloat16 is rounded to nearest even by hand."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    blocks = []
    place = 0
    for name, (dtype, values) in tensors.items():
        array = np.asarray(values)
        block = _to_bfloat16(array).tobytes() if dtype == "BF16" else array.astype(_KINDS[dtype]).tobytes()
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [place, place + len(block)]}
        blocks.append(block)
        place += len(block)
    write_file(path, json.dumps(header).encode(), b"".join(blocks))


def write_file(path: Path, header: bytes, data: bytes) -> None:
    """Write a safetensors file from the bytes of its header and its data, which may be invalid."""
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def deltas(folder: Path) -> dict[str, Matrix]:
    """Return the dense delta of every module of a LoRA folder, by its configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = read_tensors(folder / "adapter_model.safetensors")
    found = {}
    for module, (a, b) in factors(tensors).items():
        found[module] = _scaling(config, module, len(a)) * (b @ a)
    return found


def _scaling(config: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = next((v for k, v in config.get("alpha_pattern", {}).items() if module.endswith(k)), config["lora_alpha"])
    return float(alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))


def factors(tensors: Mapping[str, Matrix]) -> dict[str, tuple[Matrix, Matrix]]:
    """Return A and B of every module."""
    start, end = "base_model.model.", ".lora_A.weight"
    modules = [name[len(start) : -len(end)] for name in tensors if name.endswith(end)]
    return {m: (tensors[f"{start}{m}.lora_A.weight"], tensors[f"{start}{m}.lora_B.weight"]) for m in modules}


def soup(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Matrix]:
    """Return the weighted sum of the experts' dense deltas."""
    total: dict[str, Matrix] = {}
    for folder, weight in zip(folders, weights, strict=True):
        for module, delta in deltas(folder).items():
            total[module] = total.get(module, np.zeros_like(delta)) + weight * delta
    return total


def magnitudes(folders: Sequence[Path], weights: Sequence[float]) -> dict[str, Matrix]:
    """Return, for each module, sum |w s| |B| |A|: what the error bound of a product is measured by."""
    total: dict[str, Matrix] = {}
    for folder, weight in zip(folders, weights, strict=True):
        config = json.loads((folder / "adapter_config.json").read_text())
        for module, (a, b) in factors(read_tensors(folder / "adapter_model.safetensors")).items():
            part = abs(weight * _scaling(config, module, len(a))) * (np.abs(b) @ np.abs(a))
            total[module] = total.get(module, np.zeros_like(part)) + part
    return total


def relative_error(got: Matrix, want: Matrix) -> float:
    """Return the Frobenius norm of the difference over that of what is wanted."""
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _decode(entry: Mapping[str, Any], data: bytes) -> Matrix:
    block = data[slice(*entry["data_offsets"])]
    if entry["dtype"] == "BF16":
        bits = np.frombuffer(block, "<u2").astype(np.uint32) << 16
        values = bits.view(np.float32)
    else:
        values = np.frombuffer(block, _KINDS[entry["dtype"]])
    return values.astype(np.float64).reshape(entry["shape"])


def _to_bfloat16(array: Any) -> NDArray[np.uint16]:
    bits = np.asarray(array).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
