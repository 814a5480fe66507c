"""Run by test_fused.py in a process of its own: the GPU's kernel in Triton's interpreter, against float64.

It is no test module by its name, since TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups.mixing.fused import add_gated

assert os.environ["TRITON_INTERPRET"] == "1"

SIZES = [
    # rows of the batch, rows a gate, ranks, outputs
    (1, 1, 16, 64),
    (16, 1, 96, 128),
    (3, 1, 5, 7),
    (4, 37, 33, 70),
    (70, 2, 31, 65),
    (2, 0, 4, 8),
]
# bfloat16 is left to a GPU: the interpreter is NumPy, which multiplies its bits as whole numbers
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}


def _random(*shape: int, seed: int, dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).to(dtype)


@pytest.mark.parametrize("dtype", list(UNIT))
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize(("gates", "each", "ranks", "outputs"), SIZES)
def test_the_kernel_adds_gated_products(
    gates: int, each: int, ranks: int, outputs: int, *, is_shared: bool, dtype: torch.dtype
) -> None:
    columns = None
    if is_shared:
        columns = torch.from_numpy(np.random.default_rng(4).integers(0, max(1, ranks // 2), size=ranks))
    width = ranks if columns is None else max(1, ranks // 2)
    y = _random(gates * each, outputs, seed=0, dtype=dtype)
    low = _random(gates * each, width, seed=1, dtype=dtype)
    gate = _random(gates, ranks + 3, seed=2, dtype=dtype)[:, 2 : 2 + ranks]  # a view, as the layers have it
    b = _random(ranks + 2, outputs, seed=3, dtype=dtype)[1 : 1 + ranks]
    before = y.double()
    spread = low.double() if columns is None else low.double()[:, columns]
    gated = spread * gate.double().repeat_interleave(each, dim=0)
    add_gated(y, low, gate, b, columns)
    want = before + gated @ b.double()
    # the gated activation and y are rounded once each; K products are summed in float32
    unit, sizes = UNIT[dtype], gated.abs() @ b.double().abs()
    owed = unit * want.abs() + unit * sizes + (ranks + 2) * UNIT[torch.float32] * (before.abs() + sizes)
    assert bool(((y.double() - want).abs() <= 1.01 * owed).all())
    if each:
        assert not torch.equal(y.double(), before)
