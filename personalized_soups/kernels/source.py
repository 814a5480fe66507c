"""The source code of all Triton kernels. This file is imported when a kernel is launched. Only it uses Triton.

The only annotation of a parameter that Triton's compiler accepts is `tl.constexpr`, so other parameters have no
annotation. Triton's interpreter (TRITON_INTERPRET=1) does not enforce this rule. So `tests/kernels` runs every kernel
in the interpreter and also compiles it for real GPUs.

Indices: n = row of the input, k = rank or column, o = out_feature, e = expert, u = user, p = value of one expert.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_gated_kernel(
    y, low, gate, b, columns, tiles,
    num_rows, rows_each, y_stride, low_stride, gate_stride,
    HAS_COLUMNS: tl.constexpr, IS_ALIGNED: tl.constexpr,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    """Compute `y[n, o] += sum_k low[n, columns[k]] * gate[n // rows_each, k] * b[k, o]`.

    One program computes ROWS rows of one tile. A row of `tiles` has six numbers: the first column of y, the number of
    outputs, the first rank, the rank after the last, the offset in b, and the stride of b from one rank to the next.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    # int64: offsets may exceed 2^31
    tile = tiles + tl.program_id(1).to(tl.int64) * 6
    first_output = tl.load(tile)
    num_outputs = tl.load(tile + 1).to(tl.int32)
    first_rank = tl.load(tile + 2).to(tl.int32)
    end_rank = tl.load(tile + 3).to(tl.int32)
    first_b = tl.load(tile + 4)
    b_stride = tl.load(tile + 5)
    if IS_ALIGNED:
        # The compiler does not know the alignment of offsets that are loaded from memory. If it knows the alignment, it
        # loads 16 bytes at once.
        first_output = tl.multiple_of(first_output, 16)
        num_outputs = tl.multiple_of(num_outputs, 16)
        first_b = tl.multiple_of(first_b, 16)
        b_stride = tl.multiple_of(b_stride, 16)
    output = tl.arange(0, OUTPUTS)
    is_row = row < num_rows
    is_output = output < num_outputs
    wide_row = row.to(tl.int64)
    gate_row = (row // rows_each).to(tl.int64)
    total = tl.zeros((ROWS, OUTPUTS), dtype=tl.float32)
    for start in range(first_rank, end_rank, RANKS):
        rank = start + tl.arange(0, RANKS)
        is_rank = rank < end_rank
        column = tl.load(columns + rank, mask=is_rank, other=0) if HAS_COLUMNS else rank
        is_low = is_row[:, None] & is_rank[None, :]
        low_tile = tl.load(low + wide_row[:, None] * low_stride + column[None, :], mask=is_low, other=0.0)
        gate_tile = tl.load(gate + gate_row[:, None] * gate_stride + rank[None, :], mask=is_low, other=0.0)
        b_row = (rank - first_rank).to(tl.int64)
        b_tile = tl.load(
            b + first_b + b_row[:, None] * b_stride + output[None, :],
            mask=is_rank[:, None] & is_output[None, :],
            other=0.0,
        )
        gated = (low_tile.to(tl.float32) * gate_tile.to(tl.float32)).to(b_tile.dtype)
        # ieee: float32 is multiplied as float32, not as TF32
        total = tl.dot(gated, b_tile, total, input_precision="ieee")
    place = y + wide_row[:, None] * y_stride + first_output + output[None, :]
    is_here = is_row[:, None] & is_output[None, :]
    before = tl.load(place, mask=is_here, other=0.0).to(tl.float32)
    tl.store(place, (before + total).to(y.dtype.element_ty), mask=is_here)


@triton.jit
def weighted_sums_kernel(
    out, experts, weights,
    num_values, num_users, num_experts, out_stride, experts_stride, weights_stride,
    USERS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """Compute `out[u, p] = sum_e weights[u, e] * experts[e, p]`. One program computes VALUES values for USERS users.

    Programs for the same values and different users are consecutive. The first of them reads the experts from memory.
    The others read the experts from the cache, which also contains the weights.
    """
    num_tiles = (num_users + USERS - 1) // USERS
    # These indices are two-dimensional, because converting one-dimensional ones uses shared memory for every expert.
    value = (tl.program_id(0) // num_tiles).to(tl.int64) * VALUES + tl.arange(0, VALUES)[None, :]
    user = (tl.program_id(0) % num_tiles) * USERS + tl.arange(0, USERS)[:, None]
    is_value = value < num_values
    is_user = user < num_users
    total = tl.zeros((USERS, VALUES), dtype=tl.float32)
    expert_start = experts
    for expert in range(num_experts):
        values = tl.load(expert_start + value, mask=is_value, other=0.0).to(tl.float32)
        weight = tl.load(weights + user * weights_stride + expert, mask=is_user, other=0.0)
        total += weight * values
        expert_start += experts_stride
    place = out + user.to(tl.int64) * out_stride + value
    tl.store(place, total.to(out.dtype.element_ty), mask=is_user & is_value)


@triton.jit
def scale_columns_kernel(
    out, pristine, scales,
    num_rows, num_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGNMENT: tl.constexpr,
):  # fmt: skip
    """Compute `out[o, k] = pristine[o, k] * scales[k]`. One program computes a tile of ROWS x COLUMNS elements.

    ALIGNMENT divides the number of columns. Triton detects only multiples of 16, but multiples of 4 are enough to load
    16 bytes of float32 at once.
    """
    num_columns = num_columns // ALIGNMENT * ALIGNMENT
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < num_columns
    scale = tl.load(scales + column, mask=is_column, other=0.0)
    place = row[:, None] * num_columns + column[None, :]
    is_here = (row < num_rows)[:, None] & is_column[None, :]
    values = tl.load(pristine + place, mask=is_here, other=0.0)
    tl.store(out + place, (values * scale[None, :]).to(out.dtype.element_ty), mask=is_here)
