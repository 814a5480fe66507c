"""Fold terms into one tensor of the base, in blocks of rows that fit into the cache.

The tensor is treated as a matrix `[M, N]`. Each block of rows is converted to the dtype of the arithmetic, all terms
are added, and the sum is rounded once to the base's dtype.

B rows of a block, R rank.
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

# Elements of a block. CPU: 2 MiB in float32, which fits into a core's cache together with the rounded copy. GPU: 4 MiB
# in 16 bits, which take about 80 microseconds over PCIe, several times as long as the launches for a block.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 21}


@dataclass(frozen=True, eq=False, slots=True)
class FoldedBlock:
    """Some rows of one soup's tensor, rounded.

    Attributes:
        soup: the number of the soup.
        start: the number of the block's first row.
        rows_BN: the rows, on the CPU. The next block overwrites them.
        total: the sum of the rows' elements, if the device computed it; else None.
    """

    soup: int
    start: int
    rows_BN: Tensor  # noqa: N815
    total: Tensor | None = None

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        # a finite sum has only finite summands; a sum that overflows proves nothing, so the elements are checked
        return (self.total is not None and math.isfinite(self.total)) or all_finite(self.rows_BN)


class Queue(Protocol):
    """Runs work in order, while the thread that submits it continues: one stream of a GPU."""

    def begin(self) -> None:
        """Make all later work wait for the work that this thread has started on the device so far."""
        ...

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        """Start work after all work submitted before, and return a function that waits until it is done."""
        ...


def folded_blocks(
    base_MN: Tensor, soups: Sequence[Sequence[Term]], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[FoldedBlock]:
    """Yield every block of every soup: the base plus the soup's terms, rounded once.

    The base is read once and transferred to a GPU once, regardless of the number of soups. Sums are accumulated in
    float32, or in float64 if the base is float64. The bytes of a block do not depend on the number of soups or threads.

    Args:
        base_MN: the base's tensor as a matrix, on the CPU, in its own dtype.
        soups: the terms of each soup; their tensors are on `device`, in the dtype of the arithmetic.
        device: where the arithmetic runs.
        dtype: the dtype of the results; the base's if left out.
    """
    if device.type == "cpu":
        yield from _direct_blocks(base_MN, soups, dtype or base_MN.dtype)
        return
    with _stream(device) as queue:
        yield from queued_blocks(base_MN, soups, device, dtype or base_MN.dtype, queue)


def queued_blocks(
    base_MN: Tensor, soups: Sequence[Sequence[Term]], device: torch.device, dtype: torch.dtype, queue: Queue
) -> Iterator[FoldedBlock]:
    """Yield the blocks of folded_blocks, computed on `device` by work that is submitted to `queue`.

    Two blocks are in the queue: while the caller writes one to a file, the next is transferred and computed. The device
    uses its buffers in the queue's order, so it needs one of each; the host needs two of each, used alternately.
    """
    shape = num_rows, _ = _block_shape(base_MN, device)
    kind = arithmetic_dtype(base_MN.dtype)
    inward = [_pinned(shape, base_MN.dtype, device) for _ in range(2)]
    outward = [_pinned(shape, dtype, device) for _ in range(2)]
    totals = [_pinned((1, 1), arithmetic_dtype(dtype), device) for _ in range(2)]
    # a copy between host and device that changes the dtype is converted by torch on the CPU, so the transfer keeps the
    # dtype and the device converts
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
                # the first soup's work transfers the base's block, and the other soups reuse it on the device
                block = inward[place % 2][: base.shape[0]].copy_(base) if number == 0 else None
                out, total = outward[turn % 2][: base.shape[0]], totals[turn % 2]
                wait = queue.submit(partial(compute, block, terms, start, out, total))
                under_way.append((wait, FoldedBlock(number, start, out, total)))
                turn += 1
        while under_way:
            yield _done(*under_way.popleft())
    finally:
        # after an error as well: the device may still use the buffers, so they must not be freed yet
        for wait, _ in under_way:
            wait()


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor of the base as a matrix `[M, N]`: M is its first axis. A vector is one row."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of the base is accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Stream:
    """A queue on a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def begin(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        # a blocking event lets the thread sleep; other events keep a core busy while they wait
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            work()
            done.record()
        return done.synchronize


# Streams that no thread uses. They are reused, since cuBLAS keeps a workspace (32 MiB on Hopper) for every stream.
_idle: defaultdict[torch.device, deque[_Stream]] = defaultdict(deque)


@contextmanager
def _stream(device: torch.device) -> Iterator[_Stream]:
    """Yield a stream that no other thread uses."""
    try:
        stream = _idle[device].pop()
    except IndexError:
        stream = _Stream(device)
    yield stream
    _idle[device].append(stream)


def _direct_blocks(base_MN: Tensor, soups: Sequence[Sequence[Term]], dtype: torch.dtype) -> Iterator[FoldedBlock]:
    """Yield the blocks of folded_blocks, computed by this thread on the CPU."""
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
    """Write the base's block plus all terms to `sum_BN`; `own_BN` keeps the base's block if a term reads it."""
    sum_BN.copy_(block_BN)
    if any(term.reads_base for term in terms):
        own_BN.copy_(sum_BN)
    for term in terms:
        term.add(sum_BN, own_BN, start)


def _done(wait: Callable[[], None], block: FoldedBlock) -> FoldedBlock:
    wait()
    return block


def _block_shape(base_MN: Tensor, device: torch.device) -> tuple[int, int]:
    # at least one row, even if it exceeds a block; an empty tensor has no columns to divide by
    num_rows, num_columns = base_MN.shape
    return max(1, min(num_rows, _BLOCK[device.type] // max(num_columns, 1))), num_columns


def _pinned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of the host that `device` can read and write without the CPU.

    Pinning takes milliseconds, and torch reuses pinned memory of the same size: so most buffers have one size.
    """
    size = math.prod(shape)
    pinned = torch.empty(max(size, _BLOCK["cuda"]) if size > 1 else 1, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned[:size].view(shape)
