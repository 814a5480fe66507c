from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from personalized_soups.methods import blocks
from personalized_soups.methods.factors import Factors
from personalized_soups.methods.overlap import inner_products, opposed_energies, row_overlaps
from tests.oracles import Matrix

# Sums of at most 60 * 40 products in float64, and a Gram matrix's square of the condition, below 1e4 here.
CLOSE = 1e-10


def factors_of(ranks: Sequence[int], *, seed: int = 0, shape: tuple[int, int] = (60, 40)) -> list[Factors]:
    random = np.random.default_rng(seed)
    return [
        Factors(
            torch.from_numpy(random.normal(size=(rank, shape[1])).astype(np.float32)),
            torch.from_numpy(random.normal(size=(shape[0], rank)).astype(np.float32)),
            scaling=0.5 + number,
        )
        for number, rank in enumerate(ranks)
    ]


def dense(factors: Factors) -> Matrix:
    a: Matrix = factors.a_RI.numpy().astype(np.float64)
    b: Matrix = factors.b_OR.numpy().astype(np.float64)
    product: Matrix = factors.scaling * (b @ a)
    return product


def mean_square_cosine(one: Matrix, other: Matrix) -> float:
    """By orthonormal bases out of a singular value decomposition, and the singular values of their product."""

    def basis(rows: Matrix) -> Matrix:
        _, values, vh = np.linalg.svd(rows, full_matrices=False)
        kept: Matrix = vh[values > 1e-5 * values[0]]
        return kept

    cosines = np.linalg.svd(basis(one) @ basis(other).T, compute_uv=False)
    return float(np.mean(cosines**2))


def test_inner_products_are_those_of_the_dense_deltas() -> None:
    factors = factors_of((3, 1, 5))
    deltas = [dense(each) for each in factors]
    want = [[float((one * other).sum()) for other in deltas] for one in deltas]
    np.testing.assert_allclose(inner_products(factors).numpy(), want, rtol=CLOSE, atol=CLOSE * np.max(want))


@pytest.mark.parametrize("ranks", [(3, 3), (2, 5, 1), (40, 4)])
def test_overlaps_are_the_mean_squared_cosines_of_principal_angles(ranks: tuple[int, ...]) -> None:
    rows = [each.a_RI for each in factors_of(ranks)]
    got = row_overlaps(rows).numpy()
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            want = mean_square_cosine(one.double().numpy(), other.double().numpy())
            assert got[i, j] == pytest.approx(want, rel=CLOSE), (i, j)


def test_overlaps_of_known_spaces() -> None:
    axes = torch.eye(6)
    turned = torch.tensor([[2.0, 1.0], [1.0, 1.0]]) @ axes[:2]  # the same plane by other rows
    half = torch.stack([axes[0], axes[3]])
    got = row_overlaps([axes[:2], turned, half, axes[4:], torch.zeros(2, 6), axes[:1].repeat(3, 1)])
    assert got[0].tolist()[:4] == pytest.approx([1, 1, 0.5, 0], abs=1e-12)
    assert bool(got[4].isnan().all())
    assert bool(got[:, 4].isnan().all())
    # three equal rows span a line, which the plane holds
    assert float(got[0, 5]) == pytest.approx(1)
    assert float(got[2, 5]) == pytest.approx(1)
    assert float(got[3, 5]) == pytest.approx(0)


@pytest.mark.parametrize("rows", [range(60), [3, 17, 4]])
@pytest.mark.parametrize("size", [1, 2**17])
def test_opposed_energies_are_counted_entry_by_entry(
    monkeypatch: pytest.MonkeyPatch, rows: Sequence[int], size: int
) -> None:
    monkeypatch.setitem(blocks._BLOCK, "cpu", size)
    factors = factors_of((3, 2, 4))
    opposed, energy = opposed_energies(factors, torch.tensor(list(rows)))
    deltas = [dense(each)[list(rows)] for each in factors]
    for i, one in enumerate(deltas):
        assert float(energy[i]) == pytest.approx((one**2).sum(), rel=CLOSE)
        for j, other in enumerate(deltas):
            want = (one**2)[np.sign(one) == -np.sign(other)].sum()
            assert float(opposed[i, j]) == pytest.approx(want, rel=CLOSE), (i, j)


def test_zeros_oppose_nothing() -> None:
    plus = Factors(torch.ones(1, 3), torch.ones(2, 1))
    nothing = Factors(torch.ones(1, 3), torch.zeros(2, 1))
    minus = Factors(torch.ones(1, 3), torch.ones(2, 1), scaling=-2.0)
    opposed, energy = opposed_energies([plus, nothing, minus], torch.arange(2))
    assert opposed.tolist() == [[0, 0, 6], [0, 0, 0], [24, 0, 0]]
    assert energy.tolist() == [6, 0, 24]
