"""Launching Triton kernels, with a fallback if a kernel cannot be compiled or launched."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Options of every launch. Multiplication and addition are fused, which saves a rounding. Triton changes its default in
# 3.10, and 3.9 warns unless the option is given.
OPTIONS = {"enable_fp_fusion": True}


class _State:
    """Whether a kernel has failed in this process."""

    has_failed = False


def is_usable(tensor: Tensor) -> bool:
    """Return whether kernels can be launched on a tensor: on a GPU, with Triton, and if no kernel has failed before.

    The environment variable PSOUPS_FUSED=0 turns all kernels off.
    """
    return tensor.is_cuda and not _State.has_failed and _has_triton()


def launched(launch: Callable[[], None], tensor: Tensor) -> bool:
    """Launch a kernel on a tensor's device, and return whether it was launched.

    If it could not be compiled or launched, no tensor has changed, and the caller uses torch operations instead. The
    first failure gives a warning and turns all kernels off in this process.

    Raises:
        torch.OutOfMemoryError: as torch operations would.
    """
    try:
        with _device_of(tensor):
            launch()
    except torch.OutOfMemoryError:
        raise
    # any error: Triton's compiler, LLVM, ptxas, the C compiler of the launcher and the driver raise their own
    except Exception as error:
        _State.has_failed = True
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        warnings.warn(
            f"a Triton kernel failed ({type(error).__name__}: {reason}). Torch operations are used instead: they are "
            "slower and give the same numbers. Set PSOUPS_FUSED=0 to turn off the kernels and this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one: Triton launches kernels on the current device."""
    if not tensor.is_cuda or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    context: AbstractContextManager[Any] = torch.cuda.device(tensor.device)
    return context


@cache
def _has_triton() -> bool:
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    return os.environ.get("PSOUPS_FUSED", "1") != "0"
