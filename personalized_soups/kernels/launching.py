"""When a Triton kernel runs, and what happens where one cannot be compiled or launched."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Multiplication and addition are fused in every kernel: one rounding less. Triton's own default changes in 3.10, and
# 3.9 warns where nothing is said.
OPTIONS = {"enable_fp_fusion": True}


class _State:
    """What this process knows of Triton."""

    has_failed = False


def is_usable(tensor: Tensor) -> bool:
    """Return whether kernels may be launched on a tensor: it is on a GPU, Triton is installed, and none has failed.

    The environment variable PSOUPS_FUSED=0 turns all kernels off.
    """
    return tensor.is_cuda and not _State.has_failed and _has_triton()


def launched(launch: Callable[[], None], tensor: Tensor) -> bool:
    """Launch a kernel on a tensor's device, and return whether that worked.

    A kernel that cannot be compiled or launched has changed nothing: the caller does the same with torch operations.
    The first failure is warned of, and no kernel is tried again in this process.

    Raises:
        torch.OutOfMemoryError: as torch operations would.
    """
    try:
        with _device_of(tensor):
            launch()
    except torch.OutOfMemoryError:
        raise
    # Triton raises what its compiler, LLVM, ptxas, the C compiler of its launcher and the driver happen to raise
    except Exception as error:
        _State.has_failed = True
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        warnings.warn(
            f"a Triton kernel failed ({type(error).__name__}: {reason}); torch operations take its place, which are "
            "slower and give the same numbers. PSOUPS_FUSED=0 turns the kernels off and this warning with them.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make a tensor's device the current one, to which Triton launches."""
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
