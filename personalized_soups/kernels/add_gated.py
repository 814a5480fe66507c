"""Add the soups of a batch (the weighted sums of the experts) to the base's output with one kernel launch.

The delta of an expert is `scaling * B @ A`. The first product, `A x` of all experts, is one call of cuBLAS. The kernel
multiplies `A x` by the gate, which holds the weights of the experts, multiplies the result by B, and adds the product
to the base's output y. Separate torch operations would write the gated activations and the product to memory and read
them again. Layers whose outputs are columns of the same tensor y share one launch.

Shapes: G = number of gates, N = rows of the input (a multiple of G), K = sum of the experts' ranks, C = columns of
`A x`, O = out_features, T = number of tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from personalized_soups.kernels import launching

# A program computes 16 to 64 rows. tl.dot needs at least 16, and the rows of a program share one read of B.
_LEAST_ROWS = 16
_MOST_ROWS = 64
_OUTPUTS = 64
_RANKS = 32
# Triton loads 16 bytes at once if it knows that the offsets are multiples of 16 elements. This holds for every dtype.
_ALIGNMENT = 16


@dataclass(frozen=True, eq=False, slots=True)
class BlockDiagonal:
    """The B's of one layer, or of several layers whose outputs are columns of the same tensor y.

    Attributes:
        blocks: the B's of each layer l as a contiguous `[K_l, O_l]` tensor. All blocks are parts of one buffer.
        first_outputs: for each layer, the first column of y that contains its outputs.
        columns_K: int64, the column of `A x` that belongs to each rank. If None, rank k belongs to column k.
        tiles: int64 `[T, 6]`, the part of the work of each program of the kernel. kernels/source.py lists the columns.
        is_aligned: whether all offsets and all numbers of outputs in `tiles` are multiples of 16.
    """

    blocks: tuple[Tensor, ...]
    first_outputs: tuple[int, ...]
    columns_K: Tensor | None  # noqa: N815
    tiles: Tensor
    is_aligned: bool

    @classmethod
    def of(cls, blocks: Sequence[Tensor], first_outputs: Sequence[int], columns_K: Tensor | None = None) -> Self:
        """Compute the tiles of the layers, and return them with the blocks. The blocks are not copied."""
        rows: list[tuple[int, ...]] = []
        first_rank = 0
        for block, first_output in zip(blocks, first_outputs, strict=True):
            num_ranks, num_outputs = block.shape
            offset = (block.data_ptr() - blocks[0].data_ptr()) // block.element_size()
            ranks = (first_rank, first_rank + num_ranks)
            rows += [
                (first_output + start, min(_OUTPUTS, num_outputs - start), *ranks, offset + start, num_outputs)
                for start in range(0, num_outputs, _OUTPUTS)
            ]
            first_rank += num_ranks
        is_aligned = all(row[place] % _ALIGNMENT == 0 for row in rows for place in (0, 1, 4, 5))
        tiles = torch.tensor(rows, dtype=torch.int64, device=blocks[0].device).reshape(len(rows), 6)
        return cls(tuple(blocks), tuple(first_outputs), columns_K, tiles, is_aligned)


def add_gated(y_NO: Tensor, low_NC: Tensor, gate_GK: Tensor, factors: BlockDiagonal) -> None:
    """Add `(low[:, columns] * gate) @ B` to y in place, for every layer of `factors`.

    On a GPU one kernel computes the result. It sums in float32 and rounds the sums once. On other devices, or if the
    kernel fails, torch operations compute the result. In both cases the gated activations are rounded to the dtype of
    y.

    Args:
        y_NO: the output of the base, which is changed in place. It may be a view of a wider tensor, so its rows may
            have a stride. Its columns must be contiguous.
        low_NC: `A x` in the dtype of y. Its rows may have a stride. It may be a part of the same tensor as y.
        gate_GK: G gates, each for N / G consecutive rows. The rows may have a stride. The columns must be contiguous.
        factors: the B's, in the dtype of y and on its device.

    Source: the kernel BGMV of Punica (arXiv 2310.18547). A gate replaces the index of the adapter.
    """
    if _is_traced_on_gpu(y_NO):
        # torch.compile does not trace into a custom operator, so it does not generate the source of the kernel again
        blocks, first_outputs = list(factors.blocks), list(factors.first_outputs)
        add_gated_operator(
            y_NO, low_NC, gate_GK, blocks, first_outputs, factors.columns_K, factors.tiles, factors.is_aligned
        )
    else:
        _add_gated(y_NO, low_NC, gate_GK, factors)


def launch(y_NO: Tensor, low_NC: Tensor, gate_GK: Tensor, factors: BlockDiagonal) -> None:
    """Launch the kernel with the arguments of `add_gated`."""
    from personalized_soups.kernels.source import add_gated_kernel

    num_rows = y_NO.shape[0]
    if num_rows == 0:
        return
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, 1 << (num_rows - 1).bit_length()))
    columns_K, tiles = factors.columns_K, factors.tiles
    add_gated_kernel[-(-num_rows // rows), tiles.shape[0]](
        y_NO, low_NC, gate_GK, factors.blocks[0], tiles if columns_K is None else columns_K, tiles,
        num_rows, num_rows // gate_GK.shape[0], y_NO.stride(0), low_NC.stride(0), gate_GK.stride(0),
        HAS_COLUMNS=columns_K is not None, IS_ALIGNED=factors.is_aligned, ROWS=rows, OUTPUTS=_OUTPUTS, RANKS=_RANKS,
        **launching.OPTIONS,
    )  # fmt: skip


def gated(low_NC: Tensor, gate_GK: Tensor, columns_K: Tensor | None) -> Tensor:
    """Return `low[:, columns] * gate` as a new `[N, K]` tensor in the dtype of `low`."""
    low_NK = low_NC if columns_K is None else low_NC.index_select(1, columns_K)
    if low_NK.shape[0] == gate_GK.shape[0]:
        return low_NK * gate_GK
    low_GMK = low_NK.view(gate_GK.shape[0], -1, gate_GK.shape[1])
    return (low_GMK * gate_GK[:, None, :]).flatten(0, 1)


def _is_traced_on_gpu(y_NO: Tensor) -> bool:
    return torch.compiler.is_compiling() and y_NO.is_cuda


def _add_gated(y_NO: Tensor, low_NC: Tensor, gate_GK: Tensor, factors: BlockDiagonal) -> None:
    if launching.is_usable(y_NO) and launching.launched(lambda: launch(y_NO, low_NC, gate_GK, factors), y_NO):
        return
    gated_NK = gated(low_NC, gate_GK, factors.columns_K)
    start = 0
    for block_KO, first in zip(factors.blocks, factors.first_outputs, strict=True):
        num_ranks, num_outputs = block_KO.shape
        part_NO = y_NO if y_NO.shape[1] == num_outputs else y_NO.narrow(1, first, num_outputs)
        part_NO.addmm_(gated_NK.narrow(1, start, num_ranks), block_KO)
        start += num_ranks


@torch.library.custom_op("personalized_soups::add_gated", mutates_args=("y_NO",))
def add_gated_operator(  # noqa: PLR0917 - an operator's arguments have places
    y_NO: Tensor,
    low_NC: Tensor,
    gate_GK: Tensor,
    blocks: list[Tensor],
    first_outputs: list[int],
    columns_K: Tensor | None,
    tiles: Tensor,
    is_aligned: bool,
) -> None:
    """Compute `add_gated` as a custom operator, which is one node for torch.compile.

    The fields of `BlockDiagonal` are separate arguments, because an operator cannot take a dataclass.
    """
    _add_gated(y_NO, low_NC, gate_GK, BlockDiagonal(tuple(blocks), tuple(first_outputs), columns_K, tiles, is_aligned))


@add_gated_operator.register_fake
def _(*_arguments: object) -> None:
    """Do nothing, because the operator has no result and changes y in place."""
