"""Check a tensor for NaN and infinity at the cost of one sum."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether the tensor contains neither NaN nor infinity.

    The tensor may have any floating-point dtype and be on any device. Memory is allocated for one scalar only, unless
    the sum of the elements is not finite.
    """
    # A sum with a NaN or infinite term is not finite, so a finite sum proves that all elements are finite. The sum of
    # finite elements may also overflow. So if the sum is not finite, check each element, which takes about fifty times
    # as long.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
