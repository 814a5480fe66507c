"""Scale the columns of a matrix on a GPU. The matrix is read and written once.

Shapes: O = out_features (rows), K = sum of the experts' ranks (columns).
"""

from __future__ import annotations

import math

from torch import Tensor

from personalized_soups.kernels import launching

# The number of matrix elements that one program computes: 32 for each of its 128 threads.
_TILE = 4096
_MOST_COLUMNS = 512


def scale_columns(pristine_OK: Tensor, scales_K: Tensor, out_OK: Tensor) -> bool:
    """Write `out[o, k] = pristine[o, k] * scales[k]` with a kernel, and return whether the kernel was launched.

    The products are computed in float32 and rounded once to the dtype of `out`. If the result is False, `out` is
    unchanged.

    Args:
        pristine_OK: the unscaled matrix, contiguous and in float32.
        scales_K: the scale of each column, contiguous, in float32 and on the same device.
        out_OK: the output, contiguous, in float32, float16 or bfloat16 and on the same device.
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
