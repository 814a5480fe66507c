"""Add terms to one tensor of the base, in blocks of rows that fit into the cache.

The tensor is viewed as a matrix. Each block of rows is converted to the dtype of the arithmetic, all terms are added,
and the sum is rounded once.

Shapes: M and N = rows and columns of the base's matrix, B = number of rows of a block.
"""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from personalized_soups.merging.computing.terms import Term
from personalized_soups.methods.finite import all_finite

# The number of elements of a block. On a CPU a block takes 2 MiB in float32, which fits into a core's cache together
# with the rounded copy. On a GPU a block takes 4 MiB in a 16-bit dtype. Its transfer over PCIe takes about 80
# microseconds, several times as long as the kernel launches for a block.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 21}


@dataclass(frozen=True, eq=False, slots=True)
class FoldedBlock:
    """A block of rows of one soup's tensor, rounded to the dtype of the result.

    Attributes:
        soup: the index of the soup.
        start: the index of the block's first row in the matrix.
        rows_BN: the rows, on the CPU. The next block overwrites them.
        total: the sum of all elements of the block if a GPU computed it, else None.
    """

    soup: int
    start: int
    rows_BN: Tensor  # noqa: N815
    total: Tensor | None = None

    def is_finite(self) -> bool:
        """Return whether all elements are finite."""
        # a finite sum has only finite summands, but finite summands can overflow, so then each element is checked
        return (self.total is not None and math.isfinite(self.total)) or all_finite(self.rows_BN)


class Queue(Protocol):
    """Runs functions on a device in the order in which they are submitted, such as a stream of a GPU.

    The thread that submits a function does not wait for it.
    """

    def begin(self) -> None:
        """Make all functions that are submitted later wait for the work that this thread has started on the device."""
        ...

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        """Submit `work`, which starts when all work before it is done. Return a function that waits for `work`."""
        ...


def folded_blocks(
    base_MN: Tensor, soups: Sequence[Sequence[Term]], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[FoldedBlock]:
    """Yield the blocks of every soup. A block is the base's rows plus the soup's terms, rounded once.

    The base is read once, and copied to a GPU once, regardless of the number of soups. The sums are computed in
    float32, or in float64 if the base is float64. The bytes of a block do not depend on the number of soups or threads.

    Args:
        base_MN: the base's tensor as a matrix, on the CPU in its own dtype.
        soups: the terms of each soup.
        device: the device that computes the blocks.
        dtype: the dtype of the blocks. The default is the base's dtype.
    """
    if device.type == "cpu":
        yield from _direct_blocks(base_MN, soups, dtype or base_MN.dtype)
        return
    with _stream(device) as queue:
        yield from queued_blocks(base_MN, soups, device, dtype or base_MN.dtype, queue)


def queued_blocks(
    base_MN: Tensor, soups: Sequence[Sequence[Term]], device: torch.device, dtype: torch.dtype, queue: Queue
) -> Iterator[FoldedBlock]:
    """Yield the same blocks as `folded_blocks`. They are computed on `device` by work that is submitted to `queue`.

    Two blocks are in the queue at once: while the caller writes the first to a file, the second is copied and computed.
    The device needs one buffer of each kind, because the work runs in order. The host needs two of each kind and uses
    them in turn.
    """
    shape = num_rows, _ = _block_shape(base_MN, device)
    kind = arithmetic_dtype(base_MN.dtype)
    inward = [_pinned(shape, base_MN.dtype, device) for _ in range(2)]
    outward = [_pinned(shape, dtype, device) for _ in range(2)]
    totals = [_pinned((1, 1), arithmetic_dtype(dtype), device) for _ in range(2)]
    # if a copy between host and device changes the dtype, torch converts on the CPU; so the transfers keep the dtype,
    # and the device converts
    kinds = (base_MN.dtype, kind, kind, dtype)
    arrived, sums, own, leaving = (torch.empty(shape, dtype=each, device=device) for each in kinds)

    def compute(block: Tensor | None, terms: Sequence[Term], start: int, out: Tensor, total: Tensor) -> None:
        size = out.shape[0]
        if block is not None:
            arrived[:size].copy_(block, non_blocking=True)
        _add_up(sums[:size], own[:size], arrived[:size], terms, start)
        out.copy_(leaving[:size].copy_(sums[:size]), non_blocking=True)
        total.copy_(leaving[:size].sum(dtype=total.dtype), non_blocking=True)

    under_way: deque[tuple[Callable[[], None], FoldedBlock]] = deque()
    turn = 0
    queue.begin()
    try:
        for place, start in enumerate(range(0, base_MN.shape[0], num_rows)):
            base = base_MN[start : start + num_rows]
            for number, terms in enumerate(soups):
                if len(under_way) == 2:
                    yield _done(*under_way.popleft())
                # only the first soup's work copies the base's block to the device, and the other soups reuse the copy
                block = inward[place % 2][: base.shape[0]].copy_(base) if number == 0 else None
                out, total = outward[turn % 2][: base.shape[0]], totals[turn % 2]
                wait = queue.submit(partial(compute, block, terms, start, out, total))
                under_way.append((wait, FoldedBlock(number, start, out, total)))
                turn += 1
        while under_way:
            yield _done(*under_way.popleft())
    finally:
        # also after an error: the device may still use the buffers, so they must not be freed before the work is done
        for wait, _ in under_way:
            wait()


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a view of a tensor as a matrix `[M, N]`, in which M is the first axis. A vector becomes one row."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the sums for a tensor of the base with the dtype `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Stream:
    """A queue on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        # while a thread waits for a blocking event, it sleeps; with other events it would keep a core busy
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            work()
            done.record()
        return done.synchronize


# The streams that no thread uses at the moment. They are reused, because cuBLAS keeps a workspace for every stream (32
# MiB on Hopper).
_idle: defaultdict[torch.device, deque[_Stream]] = defaultdict(deque)


@contextmanager
def _stream(device: torch.device) -> Iterator[_Stream]:
    """A context manager for a stream that no other thread uses in the meantime."""
    try:
        stream = _idle[device].pop()
    except IndexError:
        stream = _Stream(device)
    yield stream
    # not in a finally: after an error the stream is not reused
    _idle[device].append(stream)


def _direct_blocks(base_MN: Tensor, soups: Sequence[Sequence[Term]], dtype: torch.dtype) -> Iterator[FoldedBlock]:
    """Yield the same blocks as `folded_blocks`. This thread computes them on the CPU."""
    shape = _block_shape(base_MN, base_MN.device)
    sums, own = (torch.empty(shape, dtype=arithmetic_dtype(base_MN.dtype)) for _ in range(2))
    rounded = torch.empty(shape, dtype=dtype)
    for start in range(0, base_MN.shape[0], shape[0]):
        block = base_MN[start : start + shape[0]]
        size = block.shape[0]
        for number, terms in enumerate(soups):
            _add_up(sums[:size], own[:size], block, terms, start)
            yield FoldedBlock(number, start, rounded[:size].copy_(sums[:size]))


def _add_up(sum_BN: Tensor, own_BN: Tensor, block_BN: Tensor, terms: Sequence[Term], start: int) -> None:
    """Write the base's block plus all terms to `sum_BN`. If a term reads the base, copy the block to `own_BN`."""
    sum_BN.copy_(block_BN)
    if any(term.reads_base for term in terms):
        own_BN.copy_(sum_BN)
    for term in terms:
        term.add(sum_BN, own_BN, start)


def _done(wait: Callable[[], None], block: FoldedBlock) -> FoldedBlock:
    # the host's buffers hold the block only after the wait
    wait()
    return block


def _block_shape(base_MN: Tensor, device: torch.device) -> tuple[int, int]:
    # at least one row, even if a row is larger than a block; max() avoids a division by 0 for an empty tensor
    num_rows, num_columns = base_MN.shape
    return max(1, min(num_rows, _BLOCK[device.type] // max(num_columns, 1))), num_columns


def _pinned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialized tensor on the host. For a GPU its memory is pinned, so the GPU can copy without the CPU.

    Pinning memory takes milliseconds, and torch reuses freed pinned memory of the same size. So most of the allocations
    have the same size.
    """
    size = math.prod(shape)
    pinned = torch.empty(max(size, _BLOCK["cuda"]) if size > 1 else 1, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned[:size].view(shape)
