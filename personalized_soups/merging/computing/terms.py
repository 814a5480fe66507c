"""The terms that a soup adds to one tensor of the base, block by block.

B rows of a block, M rows and N columns of the base's matrix, R rank or number of trained rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Term(Protocol):
    """One summand of a tensor."""

    @property
    def reads_base(self) -> bool:
        """Whether `add` reads `base_BN`."""
        ...

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the term's values for one block of rows to `sum_BN`, in place.

        Args:
            sum_BN: the sum so far, in the dtype of the arithmetic.
            base_BN: the base's block, in the same dtype; it is valid only if `reads_base`, and is not changed.
            start: the number of the block's first row.
        """
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """A low-rank delta, `left_MR @ right_RN`.

    Attributes:
        left_MR: the left factor, with scaling and weights multiplied in.
        right_RN: the right factor.
        first: the row of the base's matrix at which the delta begins.
        reads_base: False.
    """

    left_MR: Tensor  # noqa: N815
    right_RN: Tensor  # noqa: N815
    first: int = 0
    reads_base: bool = False

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the product's rows in the block."""
        # a mixture's block covers only some rows of the tensor, so the overlap may be empty
        begin = max(self.first, start)
        end = min(self.first + self.left_MR.shape[0], start + sum_BN.shape[0])
        if begin < end:
            part = sum_BN[begin - start : end - start]
            # addmm writes into `part`, so no [B, N] product is allocated
            torch.addmm(part, self.left_MR[begin - self.first : end - self.first], self.right_RN, out=part)


@dataclass(frozen=True, eq=False, slots=True)
class Dense:
    """A dense delta.

    Attributes:
        delta_MN: the delta of the whole tensor.
        reads_base: False.
    """

    delta_MN: Tensor  # noqa: N815
    reads_base: bool = False

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the delta's rows in the block."""
        sum_BN.add_(self.delta_MN[start : start + sum_BN.shape[0]])


@dataclass(frozen=True, eq=False, slots=True)
class Toward:
    """A tensor that an expert trained whole, relative to the base's: `weight * (value - base)`.

    Attributes:
        value_MN: the expert's tensor, on the CPU in its own dtype.
        weight: the expert's mixing weight.
        reads_base: True.
    """

    value_MN: Tensor  # noqa: N815
    weight: float
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the weighted difference in the block."""
        # moved block by block, so that a GPU never holds the whole tensor
        value_BN = self.value_MN[start : start + sum_BN.shape[0]].to(sum_BN.device, sum_BN.dtype)
        # the difference first: weight * value - weight * base would cancel digits
        sum_BN.add_(value_BN - base_BN, alpha=self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class TowardRows:
    """The rows of an embedding whose tokens an expert trained: `weight * (value - base)` in those rows, else 0.

    Attributes:
        rows_R: the numbers of the rows, on the CPU.
        value_RN: the expert's rows, on the CPU in their own dtype.
        weight: the expert's mixing weight.
        reads_base: True.
    """

    rows_R: Tensor  # noqa: N815
    value_RN: Tensor  # noqa: N815
    weight: float
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the weighted differences of the rows in the block."""
        in_block_R = (self.rows_R >= start) & (self.rows_R < start + sum_BN.shape[0])
        if bool(in_block_R.any()):
            # row numbers are compared on the CPU: on a GPU, `any` would wait for all work before it
            rows = (self.rows_R[in_block_R] - start).to(sum_BN.device)
            value = self.value_RN[in_block_R].to(sum_BN.device, sum_BN.dtype)
            sum_BN.index_add_(0, rows, value - base_BN[rows], alpha=self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class Rescale:
    """DoRA's change of the base's own outputs: `(scale - 1) * base`.

    Attributes:
        scale: the factor of each output, in float64.
        axis: 0 if the outputs are the base's rows, 1 if they are its columns.
        reads_base: True.
    """

    scale: Tensor
    axis: int
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the change of the base's rows or columns in the block."""
        # the difference is formed in float64: near 1 it would lose its digits in float32
        gain = (self.scale - 1).to(sum_BN.dtype)
        if self.axis == 0:
            gain = gain[start : start + sum_BN.shape[0]]
        sum_BN.addcmul_(base_BN, gain.unsqueeze(1 - self.axis))
