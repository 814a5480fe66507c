"""Draw the shared basis: one frozen A for all experts, which makes a merge exact at the rank of one expert.

A module's A depends only on the seed, the module's name and its shape. So experts with the same seed and rank have the
same A, whichever other modules they adapt. The random bits come from Philox and are converted to floats here, so the
values are equal on every machine and with every version of torch and NumPy.

Shapes: R = rank, I = in_features.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WRAPPER = "base_model.model."


def basis_factor(module: str, rank: int, in_features: int, seed: int) -> Tensor:
    """Return A of one module, (R, I), float32 on the CPU. It is uniform in +-1/sqrt(I), like PEFT's initial A."""
    name = f"{seed}/{module}/{rank}x{in_features}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    raw = np.random.Philox(key=key).random_raw(rank * in_features)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)  # in [-1, 1)
    return torch.from_numpy(unit / np.float32(in_features**0.5)).reshape(rank, in_features)


def set_shared_basis(model: Any, seed: int, *, adapter: str = "default") -> None:
    """Set A of every LoRA module of a PEFT model to the shared basis in place, and freeze A."""
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            weight = module.lora_A[adapter].weight
            rank, in_features = weight.shape
            with torch.no_grad():
                weight.copy_(basis_factor(name.removeprefix(_WRAPPER), rank, in_features, seed))
            weight.requires_grad_(False)


def freeze_basis(model: Any, *, adapter: str = "default") -> None:
    """Freeze A of every LoRA module in place. This is needed after a checkpoint is loaded, which makes A trainable."""
    for module in model.modules():
        if adapter in getattr(module, "lora_A", {}):
            module.lora_A[adapter].weight.requires_grad_(False)
