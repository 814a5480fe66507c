"""The features of texts as a matrix that is only multiplied: sparse for counts of words, dense for hidden states.

Shapes: N = texts, F = features, Z = stored entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Rows(Protocol):
    """A matrix [N, F], float64."""

    @property
    def shape(self) -> tuple[int, int]:
        """N and F."""
        ...

    def dot(self, vector_F: Floats, /) -> Floats:
        """Return [N]: the matrix times a vector."""
        ...

    def transposed_dot(self, vector_N: Floats, /) -> Floats:
        """Return [F]: the transposed matrix times a vector."""
        ...

    def __getitem__(self, chosen: Ints, /) -> Self:
        """Return the rows with these indices, in this order."""
        ...


@dataclass(frozen=True, eq=False, slots=True)
class SparseRows:
    """A matrix that stores only the entries that are not 0.

    Attributes:
        rows: [Z], the row of each entry, in rising order.
        columns: [Z], the column of each entry.
        values: [Z], float64.
        shape: N and F.
    """

    rows: Ints
    columns: Ints
    values: Floats
    shape: tuple[int, int]

    @classmethod
    def of(cls, entries: Sequence[tuple[Sequence[int], Sequence[float]]], num_columns: int) -> Self:
        """Return the matrix whose row n has the columns and values `entries[n]`."""
        counts = [len(columns) for columns, _ in entries]
        return cls(
            np.repeat(np.arange(len(entries), dtype=np.int64), counts),
            np.array([column for columns, _ in entries for column in columns], dtype=np.int64),
            np.array([value for _, values in entries for value in values], dtype=np.float64),
            (len(entries), num_columns),
        )

    def dot(self, vector_F: Floats, /) -> Floats:
        """Return [N]: the matrix times a vector."""
        products = self.values * vector_F[self.columns]
        # without entries, bincount ignores the weights and returns integers
        return np.bincount(self.rows, weights=products, minlength=self.shape[0]).astype(np.float64)

    def transposed_dot(self, vector_N: Floats, /) -> Floats:
        """Return [F]: the transposed matrix times a vector."""
        products = self.values * vector_N[self.rows]
        return np.bincount(self.columns, weights=products, minlength=self.shape[1]).astype(np.float64)

    def __getitem__(self, chosen: Ints, /) -> Self:
        """Return the rows with these indices, in this order."""
        starts = np.searchsorted(self.rows, chosen, side="left")
        counts = np.searchsorted(self.rows, chosen, side="right") - starts
        # the position of each kept entry: its row's start, plus its place in the row
        places = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts) + np.repeat(starts, counts)
        rows = np.repeat(np.arange(len(chosen), dtype=np.int64), counts)
        return type(self)(rows, self.columns[places], self.values[places], (len(chosen), self.shape[1]))


@dataclass(frozen=True, eq=False, slots=True)
class DenseRows:
    """A matrix that stores all entries.

    Attributes:
        values: [N, F], float64.
    """

    values: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """N and F."""
        rows, columns = self.values.shape
        return rows, columns

    def dot(self, vector_F: Floats, /) -> Floats:
        """Return [N]: the matrix times a vector."""
        product: Floats = self.values @ vector_F
        return product

    def transposed_dot(self, vector_N: Floats, /) -> Floats:
        """Return [F]: the transposed matrix times a vector."""
        product: Floats = vector_N @ self.values
        return product

    def __getitem__(self, chosen: Ints, /) -> Self:
        """Return the rows with these indices, in this order."""
        return type(self)(self.values[chosen])
