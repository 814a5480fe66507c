"""The shared basis: one frozen A for all experts, drawn from a seed, so that their merges are exact at one rank.

Each module's A depends only on the seed, the module's name and its shape: experts of one seed and rank have the same
bytes, regardless of the other modules they adapt. The draws are raw counter-based random bits (Philox), converted to
floats here, so they are equal on every machine and under every version of torch and NumPy.

R rank, I in features
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WRAPPER = "base_model.model."


def basis_factor(module: str, rank: int, in_features: int, seed: int) -> Tensor:
    """Return a_RI of one module: float32 on the CPU, uniform in +-1/sqrt(I), the distribution of PEFT's initial A."""
    name = f"{seed}/{module}/{rank}x{in_features}".encode()
    key = np.frombuffer(hashlib.blake2b(name, digest_size=16).digest(), dtype="<u8")
    raw = np.random.Philox(key=key).random_raw(rank * in_features)
    unit = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)  # in [-1, 1)
    return torch.from_numpy(unit / np.float32(in_features**0.5)).reshape(rank, in_features)


def set_shared_basis(model: Any, seed: int, *, adapter: str = "default") -> None:
    """Set A of every LoRA module of a PEFT model to the basis, in place, and freeze it."""
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            weight = module.lora_A[adapter].weight
            rank, in_features = weight.shape
            with torch.no_grad():
                weight.copy_(basis_factor(name.removeprefix(_WRAPPER), rank, in_features, seed))
            weight.requires_grad_(False)


def freeze_basis(model: Any, *, adapter: str = "default") -> None:
    """Freeze A of every LoRA module, in place: loading a checkpoint makes all factors trainable again."""
    for module in model.modules():
        if adapter in getattr(module, "lora_A", {}):
            module.lora_A[adapter].weight.requires_grad_(False)
