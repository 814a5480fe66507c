"""On a GPU: gate and second product of a layer's soups in one kernel, added to the base's output where it stands.

The first product, `A x` over all experts, is one call of cuBLAS. Without this the gate's product and the low-rank
activations would make a trip to memory each, and the sum another one.

G gates, M rows of the input that each is for, N = G M, K sum of ranks, C columns of the first product, O out features.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# tl.dot takes no fewer rows; more of them share one read of B where there are more.
_LEAST_ROWS = 16
_MOST_ROWS = 64
_OUTPUTS = 64
_RANKS = 32


def is_usable(y: Tensor, low: Tensor) -> bool:
    """Return whether add_gated takes these: on a GPU, of one dtype, without gradients, and Triton is there."""
    if torch.is_grad_enabled() or y.dtype != low.dtype or not (y.is_contiguous() and low.is_contiguous()):
        return False
    return y.is_cuda and _has_triton()


def add_gated(y_NO: Tensor, low_NC: Tensor, gate_GK: Tensor, b_KO: Tensor, columns_K: Tensor | None = None) -> None:
    """Add `(low[:, columns] * gate) B` to y in place: summed in float32, rounded once.

    Args:
        y_NO: contiguous; it is changed.
        low_NC: `A x`, contiguous, in y's dtype; one gate's rows follow each other.
        gate_GK: of G gates, N a multiple of G; its rows may be apart (a view of a wider buffer), its columns not.
        b_KO: in y's dtype; its rows may be apart.
        columns_K: int64, the column of `low_NC` that belongs to each rank; None where they are its columns in order.
    """
    (num_rows, num_outputs), num_ranks = y_NO.shape, b_KO.shape[0]
    if num_rows == 0:
        return
    rows = min(_MOST_ROWS, max(_LEAST_ROWS, _power_of_two(num_rows)))
    grid = (-(-num_rows // rows), -(-num_outputs // _OUTPUTS))
    # a launch goes to the current device, which need not be the layer's
    here: AbstractContextManager[Any] = (
        nullcontext() if not y_NO.is_cuda or y_NO.device.index == torch.cuda.current_device() else _on(y_NO)
    )
    with here:
        _kernel()[grid](
            y_NO, low_NC, gate_GK, b_KO, low_NC if columns_K is None else columns_K,
            num_rows, num_outputs, num_ranks, num_rows // gate_GK.shape[0],
            y_NO.stride(0), low_NC.stride(0), gate_GK.stride(0), b_KO.stride(0),
            HAS_COLUMNS=columns_K is not None, ROWS=rows, OUTPUTS=_OUTPUTS, RANKS=_RANKS,
        )  # fmt: skip


def _on(tensor: Tensor) -> AbstractContextManager[Any]:
    context: AbstractContextManager[Any] = torch.cuda.device(tensor.device)
    return context


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return os.environ.get("PSOUPS_FUSED", "1") != "0"


@cache
def _kernel() -> Any:
    """Return the kernel; Triton is imported with the first use, and only where there is a GPU (or its interpreter)."""
    from personalized_soups.mixing.kernels import add_gated_kernel

    return add_gated_kernel


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
