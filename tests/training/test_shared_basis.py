from __future__ import annotations

import hashlib

import numpy as np
import torch

from personalized_soups.training.shared_basis import basis_factor


def test_the_basis_is_a_function_of_seed_name_and_shape() -> None:
    name = "model.layers.0.self_attn.q_proj"
    a_RI = basis_factor(name, 8, 64, seed=3)
    assert a_RI.shape == (8, 64)
    assert a_RI.dtype == torch.float32
    assert torch.equal(a_RI, basis_factor(name, 8, 64, seed=3))
    others = [
        basis_factor(name, 8, 64, seed=4),
        basis_factor(name.replace("q_", "k_"), 8, 64, seed=3),
        basis_factor(name, 16, 64, seed=3)[:8],
    ]
    assert all(not torch.equal(a_RI, other) for other in others)


def test_the_basis_has_loras_own_distribution() -> None:
    a_RI = basis_factor("module", 64, 1024, seed=0).double()
    bound = 1024**-0.5
    assert a_RI.abs().max() <= bound
    num = a_RI.numel()
    # mean and variance of a uniform in +-bound, to four standard errors
    assert abs(a_RI.mean().item()) < 4 * bound / (3 * num) ** 0.5
    assert abs(a_RI.var().item() - bound**2 / 3) < 4 * bound**2 * (4 / 45 / num) ** 0.5
    assert np.linalg.matrix_rank(a_RI.numpy()) == 64


def test_the_bytes_of_the_basis_never_change() -> None:
    digest = hashlib.sha256(basis_factor("model.layers.0.mlp.up_proj", 4, 6, seed=0).numpy().tobytes()).hexdigest()
    assert digest == "a604e31f958b37e4b44a9da77baa1f9de229b9b2b3d75bdbe0fe6761e6da23b6"
