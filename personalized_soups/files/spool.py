"""Tensors set aside on the disk until it is known where they shall stand."""

from __future__ import annotations

import mmap
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor


class Spool:
    """A file of tensors, safe to write from several threads; a context manager: the file is taken away at the end."""

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
        """Write a tensor and return it as it stands in the file's pages, which need no memory of their own."""
        if not tensor.numel():
            return tensor
        flat = tensor.detach().to("cpu").contiguous()
        with self._lock:
            # a mapping begins at a page
            place = -(-self._file.tell() // mmap.ALLOCATIONGRANULARITY) * mmap.ALLOCATIONGRANULARITY
            self._file.seek(place)
            self._file.write(flat.reshape(-1).view(torch.uint8).numpy().data)
            self._file.flush()
        mapped = mmap.mmap(self._file.fileno(), flat.nbytes, access=mmap.ACCESS_COPY, offset=place)
        return torch.frombuffer(mapped, dtype=tensor.dtype).reshape(tensor.shape)
