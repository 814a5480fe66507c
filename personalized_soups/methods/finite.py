"""A check for NaN and infinity that costs no more than a sum."""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinite.

    Any floating dtype, any device. Allocates only a scalar, unless the sum is not finite.
    """
    # A sum with a NaN or infinite term is not finite, so a finite sum proves that all elements are. Finite elements may
    # also overflow the sum. Only then check each element, which takes about fifty times as long.
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())
