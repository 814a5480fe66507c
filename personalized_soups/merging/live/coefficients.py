"""Copy a profile's coefficients to the device, where the products of a live soup read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pairs of a coefficient and how many times to write it.
Numbers = Iterable[tuple[float, int]]


class Coefficients(Protocol):
    """A buffer of float32 coefficients. The CPU writes the coefficients, and the products read them."""

    def written(self, numbers: Numbers) -> AbstractContextManager[Sequence[Tensor]]:
        """Write all coefficients, and return one tensor of coefficients for each product.

        Start the products inside the `with` block. Each element of `numbers` is a coefficient and how many times to
        write it.
        """
        ...


def coefficients_on(device: torch.device, widths: Sequence[int]) -> Coefficients:
    """Return a buffer for products that take the numbers of coefficients in `widths`."""
    return _ForGpu(device, widths) if device.type == "cuda" else _ForCpu(widths)


class _ForCpu:
    """A buffer in CPU memory. The products read it directly."""

    def __init__(self, widths: Sequence[int]) -> None:
        values = torch.zeros(sum(widths))
        self._array = values.numpy()
        self._parts = values.split(list(widths))

    @contextmanager
    def written(self, numbers: Numbers) -> Iterator[Sequence[Tensor]]:
        _fill(self._array, numbers)
        yield self._parts


class _ForGpu:
    """Two slots that are used in turn, and a CUDA stream that copies them to the GPU.

    The coefficients of the next `set` can be copied while the products of this `set` run. The CPU waits only for the
    `set` before the last one, because that `set` used the same slot.
    """

    def __init__(self, device: torch.device, widths: Sequence[int]) -> None:
        self._slots = cycle([_Slot(device, widths), _Slot(device, widths)])
        self._stream = torch.cuda.Stream(device)
        # the current stream fills the slots with zeros, possibly after this constructor has returned
        self._stream.wait_stream(torch.cuda.current_stream(device))

    @contextmanager
    def written(self, numbers: Numbers) -> Iterator[Sequence[Tensor]]:
        slot = next(self._slots)
        current = torch.cuda.current_stream(self._stream.device)
        slot.was_read.synchronize()
        _fill(slot.array, numbers)
        with torch.cuda.stream(self._stream):
            slot.on_device.copy_(slot.on_host, non_blocking=True)
        current.wait_stream(self._stream)
        try:
            yield slot.parts
        finally:
            slot.was_read.record(current)


class _Slot:
    """The coefficients of one `set`, in pinned CPU memory and on the GPU.

    Attributes:
        on_host: the tensor in pinned memory.
        array: the same memory as a NumPy array.
        on_device: the tensor on the GPU.
        parts: one view of `on_device` for each product.
        was_read: the event that is recorded after the products have read the slot.
    """

    def __init__(self, device: torch.device, widths: Sequence[int]) -> None:
        self.on_host = torch.zeros(sum(widths), pin_memory=True)
        self.array = self.on_host.numpy()
        self.on_device = torch.zeros(sum(widths), device=device)
        self.parts = self.on_device.split(list(widths))
        self.was_read = torch.cuda.Event()


def _fill(array: NDArray[np.float32], numbers: Numbers) -> None:
    start = 0
    for number, width in numbers:
        array[start : start + width] = number
        start += width
