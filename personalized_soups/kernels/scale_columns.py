"""Scaling of a matrix's columns on a GPU, in one pass over memory.

O rows, K columns.
"""

from __future__ import annotations

import math

from torch import Tensor

from personalized_soups.kernels import launching

# Numbers per tile of a program: 32 for each of its 128 threads.
_TILE = 4096
_MOST_COLUMNS = 512


def scale_columns(pristine_OK: Tensor, scales_K: Tensor, out_OK: Tensor) -> bool:
    """Write `out[o, k] = pristine[o, k] scales[k]` with a kernel, and return whether it ran.

    Computed in float32 and rounded once to `out`'s dtype. If it returns False, `out` is unchanged.

    Args:
        pristine_OK: float32, contiguous.
        scales_K: float32, contiguous, on the same device.
        out_OK: float32, float16 or bfloat16 on the same device, contiguous.
    """
    return launching.is_usable(pristine_OK) and launching.launched(
        lambda: launch(pristine_OK, scales_K, out_OK), pristine_OK
    )


def launch(pristine_OK: Tensor, scales_K: Tensor, out_OK: Tensor) -> None:
    """Launch the kernel with the arguments of `scale_columns`."""
    from personalized_soups.kernels.source import scale_columns_kernel

    num_rows, num_columns = pristine_OK.shape
    if num_rows * num_columns == 0:
        return
    columns = min(_MOST_COLUMNS, 1 << (num_columns - 1).bit_length())
    rows = _TILE // columns
    scale_columns_kernel[-(-num_rows // rows), -(-num_columns // columns)](
        out_OK, pristine_OK, scales_K, num_rows, num_columns,
        ROWS=rows, COLUMNS=columns, ALIGNMENT=math.gcd(num_columns, 16), **launching.OPTIONS,
    )  # fmt: skip
