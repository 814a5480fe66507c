"""Write the tensors of a GGUF file as one safetensors file, dequantized piece by piece.

Only a few pieces are in memory at once, regardless of the size of the model.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from personalized_soups.bases.architectures import ROPE_FACTORS, name_in_model, row_order
from personalized_soups.bases.gguf_header import GgufHeader, GgufTensor, truncated
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.files.header import TORCH_DTYPES
from personalized_soups.files.strict_json import shown
from personalized_soups.files.writer import SafetensorsWriter, TensorSpec

# Receives the number of bytes that have been written and the number of all bytes.
Progress = Callable[[int, int], None]

# The values that a thread dequantizes at once. gguf's NumPy code needs about 40 bytes for each.
_PIECE_VALUES = 1 << 21
_MAX_THREADS = 4
_MAX_SHOWN = 3

# ggml's numbers for the types that are not quantized
_F32, _F16 = 0, 1


def dtype_of(header: GgufHeader) -> str:
    """Return the dtype in which the model is written, by its name in safetensors files.

    A file of float32 or float16 keeps its dtype. Any other file is written in bfloat16: it is quantized to 8 bits or
    fewer, or is bfloat16 itself. Vectors do not count, because llama.cpp stores them as float32 in every file.
    """
    types = {tensor.type_id for tensor in header.tensors.values() if len(tensor.shape) > 1}
    if types <= {_F32}:
        return "F32"
    return "F16" if types <= {_F32, _F16} else "BF16"


@dataclass(frozen=True, slots=True)
class _Source:
    """Where the values of one tensor of the model are in the file. A vector is a matrix with one column.

    Attributes:
        tensor: the file's tensor.
        num_rows, num_columns: its shape as a matrix.
        row_bytes: the bytes of one row in the file.
        order: the rows of the file in the order of the model, or None for the same order.
    """

    tensor: GgufTensor
    num_rows: int
    num_columns: int
    row_bytes: int
    order: np.ndarray | None

    @property
    def stop(self) -> int:
        """The offset of the first byte after the tensor."""
        return self.tensor.start + self.num_rows * self.row_bytes


class GgufTensors:
    """The tensors of a GGUF file, checked against those of a model.

    Args:
        header: the file's header.
        shapes: the shape of each tensor of the model, by transformers' name.

    Raises:
        FileFormatError: if the file is truncated, or if its tensors are not those of the model.
        InputError: if gguf cannot dequantize the type of a tensor.
    """

    def __init__(self, header: GgufHeader, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._path = header.path
        self._sources = {name: _source(header, tensor) for name, tensor in _matched(header, shapes).items()}
        needed = max(source.stop for source in self._sources.values())
        if needed > header.num_bytes:
            raise truncated(header.path, header.num_bytes, needed)

    def write(self, path: Path, dtype: str, on_progress: Progress | None = None) -> None:
        """Write all tensors to a new safetensors file. Each value is rounded once, from float32 to the dtype.

        Args:
            path: the file, which must not exist.
            dtype: BF16, F16 or F32.
            on_progress: receives the number of bytes that are written, and of all bytes.
        """
        specs = [TensorSpec(name, dtype, source.tensor.shape) for name, source in self._sources.items()]
        total = sum(spec.num_bytes for spec in specs)
        data = np.memmap(self._path, np.uint8, mode="r")
        num_threads = min(_MAX_THREADS, os.cpu_count() or 1)
        with (
            SafetensorsWriter(path, specs, {"format": "pt"}) as writer,
            ThreadPoolExecutor(num_threads, thread_name_prefix="dequantize") as pool,
        ):
            done = 0
            for num_bytes in pool.map(lambda piece: self._write(piece, data, writer, dtype), self._pieces()):
                done += num_bytes
                if on_progress is not None:
                    on_progress(done, total)

    def _pieces(self) -> Iterator[tuple[str, slice]]:
        for name, source in self._sources.items():
            step = max(1, _PIECE_VALUES // source.num_columns)
            for start in range(0, source.num_rows, step):
                yield name, slice(start, min(start + step, source.num_rows))

    def _write(self, piece: tuple[str, slice], data: np.ndarray, writer: SafetensorsWriter, dtype: str) -> int:
        import torch
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        name, rows = piece
        source = self._sources[name]
        stored = data[source.tensor.start : source.stop].reshape(source.num_rows, source.row_bytes)
        # ggml quantizes within rows, so rows can be reordered before they are dequantized
        chosen = stored[rows] if source.order is None else stored[source.order[rows]]
        values = dequantize(np.array(chosen), GGMLQuantizationType(source.tensor.type_id))
        rounded = torch.from_numpy(values).to(TORCH_DTYPES[dtype]).reshape(-1)
        writer.write(name, rounded, rows.start * source.num_columns * rounded.element_size())
        return rounded.numel() * rounded.element_size()


def _matched(header: GgufHeader, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, GgufTensor]:
    """Return the file's tensors by the model's names. The file must have exactly the tensors of the model."""
    found: dict[str, GgufTensor] = {}
    strange = []
    for tensor in header.tensors.values():
        name = name_in_model(tensor.name)
        if name is not None and name in shapes:
            found[name] = tensor
        elif tensor.name != ROPE_FACTORS:  # the configuration has these values
            strange.append(shown(tensor.name))
    missing = sorted(shapes.keys() - found.keys())
    wrong = [
        f"{tensor.name} has the shape {tensor.shape}, but the model needs {shapes[name]}"
        for name, tensor in found.items()
        if tensor.shape != shapes[name]
    ]
    problems = [
        *([f"it lacks {len(missing)} tensors, such as {', '.join(missing[:_MAX_SHOWN])}"] if missing else []),
        *([f"the model has no place for {', '.join(strange[:_MAX_SHOWN])}"] if strange else []),
        *wrong[:_MAX_SHOWN],
    ]
    if problems:
        raise FileFormatError(
            f"the tensors of the GGUF file are not those of a {header.architecture} model: {'; '.join(problems)}",
            where=str(header.path),
            mend="give a complete GGUF file of one model; join a split file with llama-gguf-split --merge",
        )
    return found


def _source(header: GgufHeader, tensor: GgufTensor) -> _Source:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    is_vector = len(tensor.shape) == 1
    num_columns = 1 if is_vector else tensor.shape[-1]
    num_rows = math.prod(tensor.shape) // max(num_columns, 1)
    try:
        block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type_id)]
    except (ValueError, KeyError):
        raise _unknown_type(header, tensor, f"the unknown type {tensor.type_id}") from None
    if not _can_dequantize(tensor.type_id):
        raise _unknown_type(header, tensor, f"the type {GGMLQuantizationType(tensor.type_id).name}")
    if num_columns % block_values:
        raise FileFormatError(
            f"the tensor {tensor.name} has rows of {num_columns} values, which are not blocks of {block_values}",
            where=str(header.path),
            mend="download or convert the file again",
        )
    row_bytes = num_columns // block_values * block_bytes
    return _Source(tensor, num_rows, num_columns, row_bytes, row_order(header, tensor.name, tensor.shape[0]))


def _can_dequantize(type_id: int) -> bool:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    kind = GGMLQuantizationType(type_id)
    try:
        dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _unknown_type(header: GgufHeader, tensor: GgufTensor, what: str) -> InputError:
    return InputError(
        f"the tensor {tensor.name} has {what}, which the installed gguf cannot dequantize",
        where=str(header.path),
        mend="give a file of another quantization, such as Q8_0; or run pip install --upgrade gguf",
    )
