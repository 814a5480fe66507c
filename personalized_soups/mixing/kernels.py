"""The Triton kernel behind mixing.fused; it is checked on the CPU by Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def add_gated_kernel(
    y: Any,
    low: Any,
    gate: Any,
    b: Any,
    columns: Any,
    num_rows: Any,
    num_outputs: Any,
    num_ranks: Any,
    rows_a_gate: Any,
    y_stride: Any,
    low_stride: Any,
    gate_stride: Any,
    b_stride: Any,
    HAS_COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    RANKS: tl.constexpr,
) -> None:
    """y[n, o] += sum_k low[n, columns[k]] gate[n // rows_a_gate, k] b[k, o], a tile of ROWS x OUTPUTS a program."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    output = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row = row < num_rows
    is_output = output < num_outputs
    # tensors may have more numbers than 32 bits count
    wide_row = row.to(tl.int64)
    gate_row = (row // rows_a_gate).to(tl.int64)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(0, num_ranks, RANKS):
        rank = start + tl.arange(0, RANKS)
        is_rank = rank < num_ranks
        column = tl.load(columns + rank, mask=is_rank, other=0) if HAS_COLUMNS else rank
        is_low = is_row[:, None] & is_rank[None, :]
        low_tile = tl.load(low + wide_row[:, None] * low_stride + column[None, :], mask=is_low, other=0.0)
        gate_tile = tl.load(gate + gate_row[:, None] * gate_stride + rank[None, :], mask=is_low, other=0.0)
        b_tile = tl.load(
            b + rank.to(tl.int64)[:, None] * b_stride + output[None, :],
            mask=is_rank[:, None] & is_output[None, :],
            other=0.0,
        )
        gated = (low_tile.to(tl.float32) * gate_tile.to(tl.float32)).to(b_tile.dtype)
        # ieee: float32 is multiplied as float32, not as TF32
        total = tl.dot(gated, b_tile, total, input_precision="ieee")
    place = y + wide_row[:, None] * y_stride + output[None, :]
    is_here = is_row[:, None] & is_output[None, :]
    tl.store(
        place, (tl.load(place, mask=is_here, other=0.0).to(tl.float32) + total).to(y.dtype.element_ty), mask=is_here
    )
