"""Folding: what soups add to one tensor of the base, in blocks that stay in the cache.

A tensor of the base is seen as a matrix of its leading rows, `[M, N]`. Each block of rows is converted to the dtype of
the arithmetic, every term is added, and the sum is rounded once to the base's dtype.

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

# Elements of a block. On a CPU 2 MiB in float32, which with its rounded copy stays near a core. For a GPU 4 MiB in 16
# bits: they take some 80 microseconds over PCIe, several times as long as a block's launches.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 21}


@dataclass(frozen=True, eq=False, slots=True)
class FoldedBlock:
    """Some rows of one soup's tensor, rounded.

    `rows_BN` is on the CPU and overwritten when the next block is asked for. `total` is the sum of its elements, where
    the device has computed it.
    """

    soup: int
    start: int
    rows_BN: Tensor  # noqa: N815
    total: Tensor | None = None

    def is_finite(self) -> bool:
        """Return whether no element is NaN or infinite."""
        return (self.total is not None and math.isfinite(self.total)) or all_finite(self.rows_BN)


class Queue(Protocol):
    """Runs work in order, beside the thread that submits it: one stream of a GPU."""

    def begin(self) -> None:
        """Let all work wait for what this thread has started on the device so far."""
        ...

    def submit(self, work: Callable[[], None]) -> Callable[[], None]:
        """Start work after all that was submitted before, and return a function that waits until it is done."""
        ...


def folded_blocks(
    base_MN: Tensor, soups: Sequence[Sequence[Term]], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[FoldedBlock]:
    """Yield every block of every soup: `base + its terms`, rounded once.

    The base is read once, and crosses to a GPU once, whatever the number of soups. Accumulated in float32, in float64
    where the base is. A block's bytes depend on nothing but its rows: not on the number of soups or of threads.

    Args:
        base_MN: the base's tensor as a matrix, on the CPU, in its own dtype.
        soups: the terms of each soup; their tensors are on `device` and in the dtype of the arithmetic.
        device: where the arithmetic is done.
        dtype: to which the sums are rounded; the base's own where left out.
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

    Two blocks are under way: while the caller writes one to a file, the next is transferred and computed. The device's
    buffers are used in the queue's order, so one of each is enough; the host's are two of each, used in turn.
    """
    shape = num_rows, _ = _block_shape(base_MN, device)
    kind = arithmetic_dtype(base_MN.dtype)
    inward = [_pinned(shape, base_MN.dtype, device) for _ in range(2)]
    outward = [_pinned(shape, dtype, device) for _ in range(2)]
    totals = [_pinned((1, 1), arithmetic_dtype(dtype), device) for _ in range(2)]
    # torch changes a dtype between host and device on the CPU: so it is changed on the device, before or after
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
                # only the first soup's work transfers the base's block, which stays on the device for the others
                block = inward[place % 2][: base.shape[0]].copy_(base) if number == 0 else None
                out, total = outward[turn % 2][: base.shape[0]], totals[turn % 2]
                wait = queue.submit(partial(compute, block, terms, start, out, total))
                under_way.append((wait, FoldedBlock(number, start, out, total)))
                turn += 1
        while under_way:
            yield _done(*under_way.popleft())
    finally:
        # after an error, too: buffers must not be freed while the device uses them
        for wait, _ in under_way:
            wait()


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor of the base as a matrix of its leading rows, `[M, N]`; a vector is one row."""
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
        # blocking: the thread sleeps, where it would keep a core busy otherwise
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            work()
            done.record()
        return done.synchronize


# Streams that no thread uses. They are used again, since cuBLAS keeps a workspace (32 MiB on Hopper) for every stream.
_idle: defaultdict[torch.device, deque[_Stream]] = defaultdict(deque)


@contextmanager
def _stream(device: torch.device) -> Iterator[_Stream]:
    """Lend a stream to a thread."""
    try:
        stream = _idle[device].pop()
    except IndexError:
        stream = _Stream(device)
    yield stream
    _idle[device].append(stream)


def _direct_blocks(base_MN: Tensor, soups: Sequence[Sequence[Term]], dtype: torch.dtype) -> Iterator[FoldedBlock]:
    """Yield the blocks of folded_blocks, computed by this thread."""
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
    """Write the base's block and all terms into `sum_BN`; `own_BN` holds the base where a term reads it."""
    sum_BN.copy_(block_BN)
    if any(term.reads_base for term in terms):
        own_BN.copy_(sum_BN)
    for term in terms:
        term.add(sum_BN, own_BN, start)


def _done(wait: Callable[[], None], block: FoldedBlock) -> FoldedBlock:
    wait()
    return block


def _block_shape(base_MN: Tensor, device: torch.device) -> tuple[int, int]:
    num_rows, num_columns = base_MN.shape
    return max(1, min(num_rows, _BLOCK[device.type] // max(num_columns, 1))), num_columns


def _pinned(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return memory of the host that `device` reads and writes by itself.

    Of one size for most tensors, so that torch, which keeps pinned memory, has it at once after the first time: pinning
    takes milliseconds.
    """
    size = math.prod(shape)
    pinned = torch.empty(max(size, _BLOCK["cuda"]) if size > 1 else 1, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned[:size].view(shape)
