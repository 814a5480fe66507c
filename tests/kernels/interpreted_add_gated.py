"""The kernel of add_gated in Triton's interpreter, against float64; test_add_gated.py runs it in its own process."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups.kernels.add_gated import BlockDiagonal, launch

assert os.environ["TRITON_INTERPRET"] == "1"

SIZES = [
    # gates, rows a gate, ranks and outputs of each layer
    (1, 1, [(16, 64)]),
    (16, 1, [(96, 128), (96, 64), (96, 64)]),
    (3, 1, [(5, 7)]),
    (4, 37, [(33, 70), (2, 130)]),
    (70, 2, [(31, 65)]),
    (2, 0, [(4, 8)]),
]
# bfloat16 is left to a GPU: the interpreter is NumPy, which multiplies its bits as whole numbers
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


def _random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(("gates", "each", "layers"), SIZES)
def test_the_kernel_adds_gated_products(
    gates: int, each: int, layers: list[tuple[int, int]], *, is_shared: bool, dtype: torch.dtype
) -> None:
    num_ranks = sum(ranks for ranks, _ in layers)
    columns, width = None, num_ranks
    if is_shared:
        width = max(1, num_ranks // 2)
        columns = torch.from_numpy(np.random.default_rng(4).integers(0, width, size=num_ranks))
    # layers' outputs begin 3 columns apart, and A x follows them in the same tensor
    starts = np.cumsum([0, *(outputs + 3 for _, outputs in layers)])
    product = _random(gates * each, int(starts[-1]) + width, seed=0, dtype=dtype)
    low = product[:, starts[-1] :]
    gate = _random(gates, num_ranks + 3, seed=2, dtype=dtype)[:, 2 : 2 + num_ranks]  # a view, as the layers have it
    buffer = _random(sum(ranks * outputs for ranks, outputs in layers), seed=3, dtype=dtype)
    parts = buffer.split([ranks * outputs for ranks, outputs in layers])
    blocks = [part.view(sizes) for part, sizes in zip(parts, layers, strict=True)]
    before = product.double()
    spread = before[:, starts[-1] :] if columns is None else before[:, starts[-1] + columns]
    gated = spread * gate.double().repeat_interleave(each, dim=0)
    dense = torch.block_diag(*(torch.nn.functional.pad(block.double(), (0, 3)) for block in blocks))
    launch(product, low, gate, BlockDiagonal.of(blocks, starts[:-1].tolist(), columns))
    want = before[:, : starts[-1]] + gated @ dense
    # the gated activation and y are rounded once each; K products are summed in float32
    unit, sizes = UNIT[dtype], gated.abs() @ dense.abs()
    owed = unit * want.abs() + unit * sizes + (num_ranks + 2) * UNIT[torch.float32] * (want.abs() + sizes)
    assert bool(((product.double()[:, : starts[-1]] - want).abs() <= 1.01 * owed).all())
    assert torch.equal(product.double()[:, starts[-1] :], before[:, starts[-1] :])
    if each:
        assert not torch.equal(product.double(), before)
