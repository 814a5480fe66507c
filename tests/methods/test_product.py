from __future__ import annotations

import numpy as np
import pytest
import torch

from personalized_soups.methods import product
from personalized_soups.methods.product import BlockSums, weighted_sums


@pytest.mark.parametrize("size", [1, 7, 64, 65, 200])
def test_sums_are_those_of_float64_to_the_products_bound(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """|err| <= (E + 1) 2^-24 sum |w| |x|, whether whole or block by block."""
    monkeypatch.setattr(product, "_CHUNK", 64)
    random = torch.Generator().manual_seed(size)
    tensors = [torch.randn(size, 3, generator=random) for _ in range(5)]
    weights = torch.randn(4, 5, generator=random, dtype=torch.float64)
    stack = np.stack([each.double().numpy().ravel() for each in tensors])
    want, room = weights.numpy() @ stack, np.abs(weights.numpy()) @ np.abs(stack)
    whole = weighted_sums(weights, tensors).double().numpy()
    assert (np.abs(whole - want) <= 6 * 2.0**-24 * room).all()
    sums = BlockSums()
    for _ in range(2):  # the buffers are used again
        in_blocks = np.concatenate([block.double().numpy() for _, block in sums.blocks(weights, tensors)], axis=1)
        assert (np.abs(in_blocks - want) <= 6 * 2.0**-24 * room).all()


def test_as_many_weights_as_tensors_are_asked_for() -> None:
    with pytest.raises(ValueError, match="3 weights for 2 tensors"):
        weighted_sums(torch.zeros(1, 3), [torch.zeros(2)] * 2)
    with pytest.raises(ValueError, match="weights for 0 tensors"):
        next(BlockSums().blocks(torch.zeros(1, 0), []))
