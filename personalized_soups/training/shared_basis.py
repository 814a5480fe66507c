"""Draw the shared basis: one frozen A for all experts, which makes a merge exact at the rank of one expert.

With a core basis, experts also share the column space of B: B is a frozen basis times a core of R x R numbers, which is
all that is trained (the read of PBLoRA as a soup). A merge then mixes the cores.

A module's A depends only on the seed, the module's name and its shape. So experts with the same seed and rank have the
same A, whichever other modules they adapt. The random bits come from Philox and are converted to floats here, so the
values are equal on every machine and with every version of torch and NumPy.

Shapes: R = rank, I = in_features, O = out_features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_WRAPPER = "base_model.model."


def basis_factor(module: str, rank: int, in_features: int, seed: int) -> Tensor:
    """Return A of one module, (R, I), float32 on the CPU. It is uniform in +-1/sqrt(I), like PEFT's initial A."""
    unit = _uniform(f"{seed}/{module}/{rank}x{in_features}", rank * in_features)
    return torch.from_numpy(unit / np.float32(in_features**0.5)).reshape(rank, in_features)


def core_factors(module: str, rank: int, in_features: int, out_features: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return A (R, I) and the basis of B (O, R) of one module, float32 on the CPU.

    A is that of the shared basis. The basis of B is uniform in +-sqrt(3/R): its entries have the variance 1/R, so that
    a step of the core moves B about as far as the same step would move an ordinary B.
    """
    unit = _uniform(f"{seed}/{module}/{out_features}x{rank}/B", out_features * rank)
    b_OR = torch.from_numpy(unit * np.float32((3 / rank) ** 0.5)).reshape(out_features, rank)
    return basis_factor(module, rank, in_features, seed), b_OR


def _uniform(name: str, size: int) -> npt.NDArray[np.float32]:
    """Return numbers in [-1, 1) that depend on the name only."""
    key = np.frombuffer(hashlib.blake2b(name.encode(), digest_size=16).digest(), dtype="<u8")
    raw = np.random.Philox(key=key).random_raw(size)
    unit: npt.NDArray[np.float32] = (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-23) - np.float32(1)
    return unit


class CoreB(nn.Module):
    """B of a LoRA module as a frozen basis times a trained core, in the place of PEFT's linear layer.

    Args:
        basis: the basis of B, (O, R), float32.
    """

    basis: Tensor

    def __init__(self, basis: Tensor) -> None:
        super().__init__()
        self.register_buffer("basis", basis, persistent=False)
        rank = basis.shape[1]
        # PEFT puts the adapter's name before this name in a checkpoint, wherever the name occurs.
        self.lora_b_core = nn.Parameter(torch.zeros(rank, rank, dtype=basis.dtype, device=basis.device))

    @property
    def weight(self) -> Tensor:
        """B, (O, R)."""
        return self.basis @ self.lora_b_core

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden states [..., O] for [..., R]."""
        return linear(linear(hidden, self.lora_b_core), self.basis)


def set_core_basis(model: Any, seed: int, *, adapter: str = "default") -> None:
    """Give every LoRA module of a PEFT model the core basis in place. A is frozen, and only B's core is trained."""
    for name, module in _lora_modules(model, adapter):
        weight, b_weight = module.lora_A[adapter].weight, module.lora_B[adapter].weight
        rank, in_features = weight.shape
        a_RI, b_OR = core_factors(name, rank, in_features, b_weight.shape[0], seed)
        with torch.no_grad():
            weight.copy_(a_RI)
        weight.requires_grad_(False)
        module.lora_B[adapter] = CoreB(b_OR.to(b_weight.device))


def unfold_cores(model: Any, *, adapter: str = "default") -> None:
    """Put an ordinary linear layer with the same B in the place of each core, so that the model is saved as LoRA."""
    for _, module in _lora_modules(model, adapter):
        found = module.lora_B[adapter]
        if isinstance(found, CoreB):
            with torch.no_grad():
                weight_OR = found.weight
                layer = nn.Linear(weight_OR.shape[1], weight_OR.shape[0], bias=False, device=weight_OR.device)
                layer.weight.copy_(weight_OR)
            module.lora_B[adapter] = layer


def _lora_modules(model: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    """Yield the name in the base and the module of each LoRA module."""
    for name, module in model.named_modules():
        if adapter in getattr(module, "lora_A", {}):
            yield name.removeprefix(_WRAPPER), module


def set_shared_basis(model: Any, seed: int, *, adapter: str = "default") -> None:
    """Set A of every LoRA module of a PEFT model to the shared basis in place, and freeze A."""
    for name, module in _lora_modules(model, adapter):
        weight = module.lora_A[adapter].weight
        rank, in_features = weight.shape
        with torch.no_grad():
            weight.copy_(basis_factor(name, rank, in_features, seed))
        weight.requires_grad_(False)


def freeze_basis(model: Any, *, adapter: str = "default") -> None:
    """Freeze A of every LoRA module in place. This is needed after a checkpoint is loaded, which makes A trainable."""
    for _, module in _lora_modules(model, adapter):
        module.lora_A[adapter].weight.requires_grad_(False)
