"""The terms that a soup adds to one tensor of the base, block by block.

Shapes: M and N = rows and columns of the base's matrix, B = number of rows of a block, R = rank or number of trained
rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Term(Protocol):
    """One summand of a soup's tensor. The other summands are the base's tensor and the other terms."""

    @property
    def reads_base(self) -> bool:
        """Whether `add` reads `base_BN`."""
        ...

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the term's rows for one block to `sum_BN`, in place.

        Args:
            sum_BN: the sum of the base's block and the terms before this term, in the dtype of the arithmetic.
            base_BN: the base's block in the same dtype. It has the base's values only if `reads_base` is True, and must
                not be changed.
            start: the index of the block's first row in the matrix.
        """
        ...


@dataclass(frozen=True, eq=False, slots=True)
class Product:
    """A low-rank delta, `left_MR @ right_RN`, which is added to some or all rows of the base's matrix.

    Attributes:
        left_MR: the left factor. The scaling and the weights are multiplied into the factors.
        right_RN: the right factor.
        first: the index of the first row of the base's matrix to which the delta is added.
        reads_base: False.
    """

    left_MR: Tensor  # noqa: N815
    right_RN: Tensor  # noqa: N815
    first: int = 0
    reads_base: bool = False

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add those rows of the product that are in the block."""
        # the delta of one block of a mixture covers only some rows of the matrix, so the overlap may be empty
        begin = max(self.first, start)
        end = min(self.first + self.left_MR.shape[0], start + sum_BN.shape[0])
        if begin < end:
            part = sum_BN[begin - start : end - start]
            # addmm adds in place, so no memory for the [B, N] product is allocated
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
        """Add the rows of the delta that are in the block."""
        sum_BN.add_(self.delta_MN[start : start + sum_BN.shape[0]])


@dataclass(frozen=True, eq=False, slots=True)
class Toward:
    """The change by a tensor that an expert trained whole: `weight * (value - base)`.

    Attributes:
        value_MN: the expert's tensor, on the CPU in its own dtype.
        weight: the expert's mixing weight.
        reads_base: True.
    """

    value_MN: Tensor  # noqa: N815
    weight: float
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the rows of the weighted difference that are in the block."""
        # the value is copied block by block, so that a GPU never holds the whole tensor
        value_BN = self.value_MN[start : start + sum_BN.shape[0]].to(sum_BN.device, sum_BN.dtype)
        # the difference is computed first, because weight * value - weight * base would lose digits
        sum_BN.add_(value_BN - base_BN, alpha=self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class TowardRows:
    """The change by an expert that trained some tokens of an embedding.

    The change is `weight * (value - base)` in the rows of these tokens, and 0 in all other rows.

    Attributes:
        rows_R: the indices of the rows, on the CPU.
        value_RN: the expert's values of the rows, on the CPU in their own dtype.
        weight: the expert's mixing weight.
        reads_base: True.
    """

    rows_R: Tensor  # noqa: N815
    value_RN: Tensor  # noqa: N815
    weight: float
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the weighted differences of those rows that are in the block."""
        in_block_R = (self.rows_R >= start) & (self.rows_R < start + sum_BN.shape[0])
        if bool(in_block_R.any()):
            # the row indices are on the CPU, because on a GPU `any` would wait for all work before it
            rows = (self.rows_R[in_block_R] - start).to(sum_BN.device)
            value = self.value_RN[in_block_R].to(sum_BN.device, sum_BN.dtype)
            sum_BN.index_add_(0, rows, value - base_BN[rows], alpha=self.weight)


@dataclass(frozen=True, eq=False, slots=True)
class Rescale:
    """The change by DoRA's scale of the base's outputs: `(scale - 1) * base`.

    Attributes:
        scale: the factor of each output, in float64.
        axis: 0 if the outputs are the rows of the base's matrix, 1 if they are the columns.
        reads_base: True.
    """

    scale: Tensor
    axis: int
    reads_base: bool = True

    def add(self, sum_BN: Tensor, base_BN: Tensor, start: int) -> None:
        """Add the rows of the change that are in the block."""
        # 1 is subtracted in float64, because the difference of values near 1 would lose digits in float32
        gain = (self.scale - 1).to(sum_BN.dtype)
        if self.axis == 0:
            gain = gain[start : start + sum_BN.shape[0]]
        sum_BN.addcmul_(base_BN, gain.unsqueeze(1 - self.axis))
