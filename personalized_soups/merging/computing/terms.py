"""Terms: what soups add to one tensor of the base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


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
