"""Names of devices and dtypes: which names are accepted, and which device `auto` stands for."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import torch

from personalized_soups.errors import UsageError

DtypeName = Literal["float32", "bfloat16", "float16"]

# The kinds of device on which merges and live weights run. They compute in float64 and use CUDA's memory interface.
MERGE_DEVICES = ("cpu", "cuda")


def resolve_device(device: str, *, kinds: Collection[str] | None = None) -> torch.device:
    """Return the device named `device`. The name `auto` stands for CUDA if torch finds a GPU, and for the CPU if not.

    Args:
        device: `auto`, or a name that torch knows, such as `cpu`, `cuda` or `cuda:1`.
        kinds: the accepted kinds, such as `("cpu", "cuda")`. None accepts every device that can compute.

    Raises:
        UsageError: if the name is unknown, its kind is not in `kinds`, the device does not exist or cannot compute.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = device.partition(":")
    # Compare the index as a Python integer, because torch stores an index in eight bits.
    if kind == "cuda" and index.isdigit() and int(index[:9]) >= torch.cuda.device_count():
        raise _missing(device)
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise _unknown(device, kinds) from None
    if kinds is not None and resolved.type not in kinds:
        raise _unknown(device, kinds)
    if resolved.type == "cuda" and torch.cuda.device_count() == 0:
        raise _missing(device)
    _check_computes(resolved, device)
    return resolved


def torch_dtype(name: DtypeName) -> torch.dtype:
    """Return the torch dtype named `name`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _check_computes(resolved: torch.device, device: str) -> None:
    try:
        torch.zeros(1, device=resolved).item()
    except (RuntimeError, NotImplementedError, AssertionError) as fault:
        reason = next(iter(str(fault).splitlines()), type(fault).__name__)
        raise UsageError(
            f"the device {device!r} can't compute: {reason}", where="device", mend="choose auto, cpu or cuda"
        ) from fault


def _unknown(device: str, kinds: Collection[str] | None) -> UsageError:
    known = ("cpu", "cuda") if kinds is None else kinds
    return UsageError(
        f"unknown device {device!r}", where="device", mend=f"choose from: auto, {', '.join(known)}, cuda:N"
    )


def _missing(device: str) -> UsageError:
    return UsageError(
        f"there is no device {device!r} on this machine: torch sees {torch.cuda.device_count()} CUDA devices",
        where="device",
        mend="use device=cpu, or install a build of torch that supports the GPU of this machine",
    )
