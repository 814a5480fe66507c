"""Launch Triton kernels. If a kernel cannot be compiled or launched, the caller uses torch operations instead."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# The options of every launch. A fused multiplication and addition rounds once instead of twice. Triton 3.10 changes the
# default of this option, and Triton 3.9 warns if the option is not given.
OPTIONS = {"enable_fp_fusion": True}


class _State:
    """Whether a kernel has failed in this process."""

    has_failed = False


def is_usable(tensor: Tensor) -> bool:
    """Return whether kernels can be launched on `tensor`.

    The tensor must be on a GPU, Triton must be installed, and no kernel may have failed in this process. If the
    environment variable PSOUPS_FUSED is 0, all kernels are turned off.
    """
    return tensor.is_cuda and not _State.has_failed and _has_triton()


def launched(launch: Callable[[], None], tensor: Tensor) -> bool:
    """Call `launch`, which launches a kernel, on the device of `tensor`. Return whether the kernel was launched.

    If the kernel could not be compiled or launched, no tensor was changed, and the caller must use torch operations
    instead. The first failure issues a warning and turns off all kernels in this process.

    Raises:
        torch.OutOfMemoryError: if the GPU has not enough free memory.
    """
    try:
        with _device_of(tensor):
            launch()
    except torch.OutOfMemoryError:
        raise
    # Catch any error: Triton, LLVM, ptxas, the C compiler and the driver raise errors of different types.
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
    """Make the device of `tensor` the current device, because Triton launches kernels on the current device."""
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
