"""Carry a profile's coefficients to the device where a live soup's products read them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from itertools import cycle
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Pairs of a number and how many times it is written.
Numbers = Iterable[tuple[float, int]]


class Coefficients(Protocol):
    """A buffer of float32 numbers that the host writes and the products read."""

    def written(self, numbers: Numbers) -> AbstractContextManager[Sequence[Tensor]]:
        """Write all numbers, and return one tensor for each product; start the products inside the `with` block."""
        ...


def coefficients_on(device: torch.device, widths: Sequence[int]) -> Coefficients:
    """Return a buffer for products that take these numbers of coefficients."""
    return _ForGpu(device, widths) if device.type == "cuda" else _ForCpu(widths)


class _ForCpu:
    """A buffer in the host's memory, which the products read directly."""

    def __init__(self, widths: Sequence[int]) -> None:
        values = torch.zeros(sum(widths))
        self._array = values.numpy()
        self._parts = values.split(list(widths))

    @contextmanager
    def written(self, numbers: Numbers) -> Iterator[Sequence[Tensor]]:
        _fill(self._array, numbers)
        yield self._parts


class _ForGpu:
    """Two slots, used alternately, and a stream that copies them to the GPU.

    The numbers for the next `set` are copied while the products of this `set` run. The host waits only for the `set`
    before the last, because it needs that slot.
    """

    def __init__(self, device: torch.device, widths: Sequence[int]) -> None:
        self._slots = cycle([_Slot(device, widths), _Slot(device, widths)])
        self._stream = torch.cuda.Stream(device)
        # the current stream fills the slots with zeros, perhaps after this constructor returns
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
    """The numbers of one `set`, in pinned host memory and on the GPU.

    Attributes:
        on_host: the pinned tensor.
        array: the pinned tensor as a NumPy array.
        on_device: the tensor on the GPU.
        parts: one view of `on_device` for each product.
        was_read: the event after which the products have read the slot.
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
