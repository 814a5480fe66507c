"""Temporary storage on the disk for tensors whose offset in the output file is not known yet."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Spool:
    """A temporary file of tensors. Several threads can write to it. The context manager removes it at its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("x+b")
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def kept(self, tensor: Tensor) -> Tensor:
        """Write a tensor to the file, and return a tensor with the same values that is mapped from the file.

        The operating system can drop mapped pages from memory.
        """
        if not tensor.numel():
            return tensor
        flat = tensor.detach().to("cpu").contiguous()
        with self._lock:
            # a mapping must start at a page
            place = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self._file.seek(place)
            self._file.write(flat.reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), flat.nbytes, access=mmap.ACCESS_COPY, offset=place)
        return torch.frombuffer(mapped, dtype=tensor.dtype).reshape(tensor.shape)
