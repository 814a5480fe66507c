"""Rows of a matrix by the block, so that what is computed between reading and writing them stays in the cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

# Measured on two cores with 2 MiB of second-level cache: half a MiB of float32 and its temporaries run at three times
# the rate of whole matrices. A GPU has no such cache, but every block costs it some twenty launches.
_BLOCK = {"cpu": 2**17}
_BLOCK_ELSEWHERE = 2**24


def row_blocks(matrix: Tensor) -> Iterator[slice]:
    """Yield the rows of a matrix in slices of about one block; at least one row each, so a result never depends on it.

    What is computed for a row must depend on that row alone.
    """
    num_rows, num_columns = matrix.shape
    step = max(1, _BLOCK.get(matrix.device.type, _BLOCK_ELSEWHERE) // max(1, num_columns))
    for start in range(0, num_rows, step):
        yield slice(start, start + step)


def widened(block: Tensor) -> Tensor:
    """Return 16-bit floats as float32, which holds them exactly; others as they are, not copied."""
    return block.float() if block.dtype.itemsize < 4 else block
