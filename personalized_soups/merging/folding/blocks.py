"""Folding: what soups add to one tensor of the base, in blocks that stay in the cache.

A tensor of the base is seen as a matrix of its leading rows, `[M, N]`. Each block of rows is converted to the dtype of
the arithmetic, every term is added, and the sum is rounded once to the base's dtype.

B rows of a block, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# Elements of a block: 2 MiB in float32, which with its rounded copy stays near a core; a GPU likes more.
_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 22}


class Term(Protocol):
    """One summand of a tensor."""

    @property
    def reads_base(self) -> bool:
        """Whether `base_BN` must be the base's own block beside the sum."""
        ...

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add what belongs to the rows from `start` on to `sum_BN`, in place; `base_BN` is not changed."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """`left_MR @ right_RN` for the rows from `first` on: a low-rank delta, its scaling and weights in `left_MR`."""

    left_MR: Tensor  # noqa: N815
    right_RN: Tensor  # noqa: N815
    first: int = 0
    reads_base: bool = False

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the rows' part of the product."""
        begin = max(self.first, start)
        end = min(self.first + self.left_MR.shape[0], start + sum_BN.shape[0])
        if begin < end:
            part = sum_BN[begin - start : end - start]
            torch.addmm(part, self.left_MR[begin - self.first : end - self.first], self.right_RN, out=part)


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """A dense delta of the whole tensor."""

    delta_MN: Tensor  # noqa: N815
    reads_base: bool = False

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the rows of the delta."""
        sum_BN.add_(self.delta_MN[start : start + sum_BN.shape[0]])


@dataclass(frozen=True, eq=False, slots=True)
class Toward:
    """`weight * (value - base)`: a tensor that an expert trained whole, relative to the base's."""

    value_MN: Tensor  # noqa: N815
    weight: float
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the weighted step from the base to the value."""
        value_BN = self.value_MN[start : start + sum_BN.shape[0]].to(sum_BN.device, sum_BN.dtype)
        sum_BN.add_(value_BN - base_BN, alpha=self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class TowardRows:
    """`weight * (value - base)` for some rows alone: trained tokens. `rows_R` is on the CPU."""

    rows_R: Tensor  # noqa: N815
    value_RN: Tensor  # noqa: N815
    weight: float
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the weighted steps of those rows that are in this block."""
        here = (self.rows_R >= start) & (self.rows_R < start + sum_BN.shape[0])
        if bool(here.any()):
            rows = (self.rows_R[here] - start).to(sum_BN.device)
            value = self.value_RN[here].to(sum_BN.device, sum_BN.dtype)
            sum_BN.index_add_(0, rows, value - base_BN[rows], alpha=self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class Rescale:
    """`(scale - 1) * base`, row by row (axis 0) or column by column (axis 1): DoRA's share of the base."""

    scale: Tensor
    axis: int
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add what the base's rows or columns gain."""
        gain = (self.scale - 1).to(sum_BN.dtype)
        if self.axis == 0:
            gain = gain[start : start + sum_BN.shape[0]]
        sum_BN.addcmul_(base_BN, gain.unsqueeze(1 - self.axis))


def folded_blocks(
    base_MN: Tensor, soups: Sequence[Sequence[Term]], device: torch.device, dtype: torch.dtype | None = None
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield `(soup, first row, block)` for every block of every soup: `base + its terms`, rounded once.

    The base is read once, whatever the number of soups. Accumulated in float32, in float64 where the base is. A block's
    bytes depend on nothing but its rows: not on the number of soups or of threads.

    Args:
        base_MN: the base's tensor as a matrix, on the CPU, in its own dtype.
        soups: the terms of each soup; their tensors are on `device` and in the dtype of the arithmetic.
        device: where the arithmetic is done.
        dtype: to which the sums are rounded; the base's own where left out.

    Yields:
        Blocks on the CPU in that dtype. A block is overwritten when the next one is asked for.
    """
    num_rows = max(1, min(base_MN.shape[0], _BLOCK[device.type] // max(base_MN.shape[1], 1)))
    lanes = [_Lane(base_MN, num_rows, device, dtype or base_MN.dtype) for _ in range(2 if device.type == "cuda" else 1)]
    under_way: list[tuple[int, int, _Lane]] = []
    turn = 0
    for start in range(0, base_MN.shape[0], num_rows):
        for number, terms in enumerate(soups):
            if len(under_way) == len(lanes):
                yield _finished(*under_way.pop(0))
            lane = lanes[turn % len(lanes)]
            lane.begin(start, terms)
            under_way.append((number, start, lane))
            turn += 1
    for each in under_way:
        yield _finished(*each)


def as_matrix(tensor: Tensor) -> Tensor:
    """Return a tensor of the base as a matrix of its leading rows, `[M, N]`; a vector is one row."""
    return tensor.reshape(1, -1) if tensor.dim() < 2 else tensor.flatten(1)


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a tensor of the base is accumulated."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _finished(number: int, start: int, lane: _Lane) -> tuple[int, int, Tensor]:
    return number, start, lane.finish()


class _Lane:
    """The buffers of one block, used again and again; on a GPU pinned, with a stream of its own.

    Two lanes in turn let one block travel while the other is computed.
    """

    def __init__(self, base_MN: Tensor, num_rows: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (num_rows, base_MN.shape[1])
        kind = arithmetic_dtype(base_MN.dtype)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._base = base_MN
        self._inward = torch.empty(shape, dtype=base_MN.dtype, pin_memory=True) if self._stream else None
        # what arrives and what leaves, as it is on the other side: a copy that converts on its way does so on the CPU
        self._arrived = torch.empty(shape, dtype=base_MN.dtype, device=device) if self._stream else None
        self._leaving = torch.empty(shape, dtype=dtype, device=device) if self._stream else None
        self._sum = torch.empty(shape, dtype=kind, device=device)
        self._own = torch.empty(shape, dtype=kind, device=device)
        self._outward = torch.empty(shape, dtype=dtype, pin_memory=self._stream is not None)
        self._size = 0

    def begin(self, start: int, terms: Sequence[Term]) -> None:
        """Start to compute a block; on a GPU this returns before it is done."""
        block = self._base[start : start + self._sum.shape[0]]
        self._size = block.shape[0]
        if self._stream is None or self._inward is None:
            self._compute(block, start, terms)
            return
        inward = self._inward[: self._size]
        inward.copy_(block)
        self._stream.wait_stream(torch.cuda.current_stream(self._sum.device))  # the terms may still be in the making
        with torch.cuda.stream(self._stream):
            self._compute(inward, start, terms)

    def finish(self) -> Tensor:
        """Return the block when it is done."""
        if self._stream is not None:
            self._stream.synchronize()
        return self._outward[: self._size]

    def _compute(self, block: Tensor, start: int, terms: Sequence[Term]) -> None:
        total = own = self._sum[: self._size]
        total.copy_(block if self._arrived is None else self._arrived[: self._size].copy_(block, non_blocking=True))
        if any(term.reads_base for term in terms):
            own = self._own[: self._size]
            own.copy_(total)
        for term in terms:
            term.add(total, own, start)
        rounded = total if self._leaving is None else self._leaving[: self._size].copy_(total)
        self._outward[: self._size].copy_(rounded, non_blocking=True)
