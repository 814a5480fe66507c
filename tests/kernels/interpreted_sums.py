"""Run by test_sums.py in a process of its own: the kernels of sums and scaled columns in Triton's interpreter.

It is no test module by its name, since TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups.kernels import scale_columns, weighted_sums

assert os.environ["TRITON_INTERPRET"] == "1"

# bfloat16 is left to a GPU: the interpreter is NumPy, which has no such numbers
UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11}
# Half the distance of the smallest numbers, where they are no longer apart by a share of themselves.
TINY = {torch.float32: 2.0**-150, torch.float16: 2.0**-25}

# one tile and several, whole tiles and odd ends, nothing at all
VALUES = [1, 7, 512, 1024, 1025, 5000, 0]
USERS = [1, 2, 3, 16, 17, 40]
EXPERTS = [1, 6, 7, 40]

every_dtype = pytest.mark.parametrize("dtype", list(UNIT))


def random(*shape: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape)).float()


def check(got: Tensor, want: np.ndarray, sizes: np.ndarray, num_terms: int) -> None:
    """|err| <= (E + 1) u sum |w x| of a float32 sum (Higham, section 3.1), and half an ulp of the output's dtype."""
    summed = (num_terms + 1) * UNIT[torch.float32] * sizes
    rounded = UNIT[got.dtype] * (np.abs(want) + summed) + TINY[got.dtype]
    np.testing.assert_array_less(np.abs(got.double().numpy() - want), summed + 1.0001 * rounded)


def check_sums(weights_UE: Tensor, experts_EP: Tensor, out_UP: Tensor) -> None:
    weights, experts = weights_UE.double().numpy(), experts_EP.double().numpy()
    weighted_sums.launch(weights_UE, experts_EP, out_UP)
    check(out_UP, weights @ experts, np.abs(weights) @ np.abs(experts), len(experts))


@every_dtype
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("experts", EXPERTS)
def test_one_users_sum(experts: int, values: int, dtype: torch.dtype) -> None:
    out = torch.full((1, values), np.nan, dtype=dtype)
    check_sums(random(1, experts, seed=0), random(experts, values, seed=1), out)


@every_dtype
@pytest.mark.parametrize("users", USERS)
@pytest.mark.parametrize("experts", EXPERTS)
def test_many_users_sums(experts: int, users: int, dtype: torch.dtype) -> None:
    values = 512 if users == 16 else 600
    out = torch.full((users, values), np.nan, dtype=dtype)
    check_sums(random(users, experts, seed=2), random(experts, values, seed=3), out)


@every_dtype
def test_rows_may_be_parts_of_wider_ones(dtype: torch.dtype) -> None:
    """Numbers around them are neither read nor written."""
    experts_EP = torch.full((5, 900), np.nan)
    experts_EP[:, 30:830] = random(5, 800, seed=4)
    out = torch.full((3, 1000), 7.0, dtype=dtype)
    check_sums(random(3, 5, seed=5), experts_EP[:, 30:830], out[:, 50:850])
    assert (out[:, :50] == 7).all()
    assert (out[:, 850:] == 7).all()


@every_dtype
@pytest.mark.parametrize(
    ("rows", "columns"),
    [(1, 1), (7, 3), (300, 16), (33, 96), (1000, 4), (5, 513), (9, 1200), (129, 24), (0, 4), (4, 0)],
)
def test_columns_are_scaled(rows: int, columns: int, dtype: torch.dtype) -> None:
    pristine, scales = random(rows, columns, seed=6), random(columns, seed=7)
    out = torch.full((rows, columns), np.nan, dtype=dtype)
    scale_columns.launch(pristine, scales, out)
    want = pristine.double().numpy() * scales.double().numpy()
    check(out, want, np.abs(want), 0)
