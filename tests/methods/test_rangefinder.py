"""The range finder against NumPy's singular value decomposition in float64, and against its own theory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from personalized_soups.methods.lowrank import Truncated
from personalized_soups.methods.rangefinder import approximate
from personalized_soups.methods.streams import Stream

Matrix = NDArray[np.float64]
STREAM = Stream.of(0, "test")
# float64: the error by subtraction carries about 1e-15 of the energy, and is only used where it is above 1e-10 of it
ROUNDING = 1e-5


def with_values(out: int, into: int, values: Matrix, seed: int = 0) -> torch.Tensor:
    """Return a random matrix with these singular values."""
    generator = np.random.default_rng(seed)
    left = np.linalg.qr(generator.standard_normal((out, len(values))))[0]
    right = np.linalg.qr(generator.standard_normal((into, len(values))))[0]
    return torch.from_numpy((left * values) @ right.T)


def error(delta: torch.Tensor, result: Truncated) -> float:
    """Return the true error's norm."""
    assert result.factors.scaling == 1
    assert result.factors.a_RI.dtype == result.factors.b_OR.dtype == torch.float64
    product = result.factors.b_OR.numpy() @ result.factors.a_RI.numpy()
    return float(np.linalg.norm(delta.double().numpy() - product))


def excess(values: Matrix, rank: int) -> float:
    """Return a bound of the mean squared error over the best one, less 1.

    With Q from (A A^T)^q A G, q = 2, and G Gaussian with rank + P columns,
    |A - Q (Q^T A)_R|^2 <= |A - A_R|^2 + |(I - Q Q^T) A_R|^2 (the rows of A - A_R and A_R are at right angles).
    The last term is at most |S2^(2q+1) G2 G1^+ S1^(-2q)|^2 (as in the proof of theorem 9.1), whose mean is
    |S2^(2q+1)|^2 |S1^(-2q)|^2 / (P - 1) (propositions 10.1 and 10.2).
    """
    columns, double = rank // 2 + 16, 4
    tail, head = values[rank:], values[:rank]
    spread = np.square(tail ** (double + 1)).sum() * np.square(1 / head**double).sum()
    return float(spread / (columns - 1) / np.square(tail).sum())


SPECTRA = {
    "flat": np.ones(200),
    "slow": 1 / np.sqrt(np.arange(1.0, 201)),
    "fast": 0.9 ** np.arange(200),
    "soup of low rank and noise": np.concatenate([np.linspace(8, 4, 20), np.linspace(2, 0.1, 180)]),
}


@pytest.mark.parametrize("rank", [1, 8, 32])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_mean_error_is_within_the_theorem(name: str, rank: int) -> None:
    values = SPECTRA[name]
    delta = with_values(260, 200, values)
    best = np.linalg.norm(values[rank:])
    squares = [
        (error(delta, approximate(delta, rank=rank, stream=Stream.of(seed, name))) / best) ** 2 for seed in range(12)
    ]
    # nothing is better than the best, except by rounding; a mean of twelve estimates the mean
    assert min(squares) >= 1 - 1e-12
    assert np.mean(squares) <= 1 + excess(values, rank) + 1e-12
    # the docstring's figure, which needs no spectrum
    assert excess(values, rank) <= rank / (rank // 2 + 15) + 1e-12


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_error_told_is_that_of_the_result(name: str, dtype: torch.dtype) -> None:
    delta = with_values(200, 260, SPECTRA[name]).to(dtype)
    before = delta.clone()
    result = approximate(delta, rank=8, stream=STREAM)
    assert math.sqrt(result.lost) == pytest.approx(error(delta, result), rel=ROUNDING)
    assert result.energy == pytest.approx(np.square(delta.double().numpy()).sum(), rel=1e-12)
    assert torch.equal(delta, before)


@pytest.mark.parametrize(("out", "into"), [(260, 200), (200, 260)])
@pytest.mark.parametrize(
    ("dtype", "room"),
    # float64: some unit roundoffs. float32: the delta is L + E, L of rank 12 and |E| <= 2^-24 |L| its own rounding. The
    # range misses E, and as much of L as E turned it: (I - P)(L + E) R = 0, so |(I - P) L| <= |E| as R spans L's rows.
    [(torch.float64, 1e-14), (torch.float32, 2 * 2.0**-24)],
)
@pytest.mark.parametrize("cut", ["rank 12", "rank 30", "all energy"])
def test_a_delta_of_low_rank_is_found_whole(out: int, into: int, dtype: torch.dtype, room: float, cut: str) -> None:
    delta = with_values(out, into, np.linspace(3, 0.01, 12)).to(dtype)
    if cut == "all energy":
        result = approximate(delta, energy=1 - 1e-12, stream=STREAM)
        assert result.factors.rank == 12
    else:
        result = approximate(delta, rank=int(cut[5:]), stream=STREAM)
    # such an error is far below the rounding error of subtracted energies
    assert error(delta, result) <= room * np.linalg.norm(delta.double().numpy())
    assert math.sqrt(result.lost) == pytest.approx(error(delta, result), rel=1e-3, abs=1e-15 * math.sqrt(result.energy))


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99])
@pytest.mark.parametrize(
    "values",
    [0.93 ** np.arange(400), 0.97 ** np.arange(400), 1 / np.arange(1.0, 401)],
    ids=["fast", "slow", "harmonic"],
)
def test_nearly_the_least_rank_that_keeps_the_energy(values: Matrix, energy: float) -> None:
    # 0.97: 76 values make up 0.99, so that the sketch grows beyond its first 32
    delta = with_values(450, 400, values)
    result = approximate(delta, energy=energy, stream=STREAM)
    tails = np.square(values)[::-1].cumsum()[::-1]
    tails = np.append(tails, 0) / tails[0]
    least = int(np.argmax(tails <= 1 - energy))
    # the same with each tail as much greater as the theorem says of a sketch of that rank
    found = next(rank for rank in range(1, 400) if tails[rank] * (1 + excess(values, rank)) <= 1 - energy)
    assert least <= result.factors.rank <= found
    assert error(delta, result) ** 2 <= (1 - energy) * float(np.square(values).sum()) * (1 + 1e-12)


@dataclass(frozen=True)
class Told(Stream):
    """A stream that records the width of each sketch, and starts with the least possible uniform number."""

    widths: list[int] = field(default_factory=list)

    def uniform(self, shape: Sequence[int], device: torch.device | str = "cpu", *, start: int = 0) -> torch.Tensor:
        """Return super's, the first one 0."""
        self.widths.append(shape[1])
        drawn = super().uniform(shape, device, start=start)
        drawn[0, 0] = 0
        return drawn


@pytest.mark.parametrize(
    ("values", "energy", "widths"),
    [
        (0.93 ** np.arange(400), 0.9, [64]),
        # 58 values are needed, between the first 32 and twice that
        (0.97 ** np.arange(400), 0.97, [64, 112]),
        # 99 are needed: the first 32, and 66.45 times what the last of them has, so that twice 32 is left out
        (np.ones(110), 0.895, [64, 164]),
        # 198 are needed, and a sketch for them would be 313 wide, over half the delta
        (np.ones(400), 0.495, [64]),
        # all of the energy, which the sketch can't be sure of by subtraction where the values end
        (np.ones(10), 1.0, [64]),
    ],
    ids=["at once", "doubled", "foreseen", "whole", "ended"],
)
def test_the_sketch_grows_by_what_is_missing(values: Matrix, energy: float, widths: list[int]) -> None:
    stream = Told(3)
    result = approximate(with_values(450, 400, values), energy=energy, stream=stream)
    assert [*stream.widths] == widths
    assert result.relative_error**2 <= 1 - energy + 1e-12


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("shape", "scale"), [((20, 30), 1.0), ((150, 160), 1.0), ((150, 160), 1e-150)])
def test_all_of_the_energy_is_the_rank_that_there_is(shape: tuple[int, int], scale: float, seed: int) -> None:
    # at 1e-150 the squares of what rounding leaves beyond the fourth value are 0 to the bit
    delta = torch.zeros(shape, dtype=torch.float64)
    delta[:6] = scale * with_values(6, shape[1], np.linspace(3, 1, 4), seed)
    assert approximate(delta, energy=1.0, stream=STREAM).factors.rank == 4


def test_rows_longer_than_a_block() -> None:
    delta = with_values(2, 2**18 + 1, np.array([2.0, 1.0]))
    assert approximate(delta, rank=1, stream=STREAM).relative_error == pytest.approx(math.sqrt(1 / 5), rel=1e-12)


@settings(max_examples=150, deadline=None)
@given(
    out=st.integers(1, 45),
    into=st.integers(1, 45),
    rank=st.integers(1, 50),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_small_deltas_are_decomposed_whole(out: int, into: int, rank: int, seed: int, dtype: torch.dtype) -> None:
    delta = torch.from_numpy(np.random.default_rng(seed).standard_normal((out, into))).to(dtype)
    result = approximate(delta, rank=rank, stream=STREAM)
    values = np.linalg.svd(delta.double().numpy(), compute_uv=False)
    room = 1e-14 * float(np.linalg.norm(values))
    # at rank 1 the sketch has 17 columns and serves from a side of 34 on
    if 2 * (rank + rank // 2 + 16) > min(out, into):
        assert abs(error(delta, result) - np.linalg.norm(values[rank:])) <= room
    assert math.sqrt(result.lost) == pytest.approx(error(delta, result), rel=ROUNDING, abs=room)
    assert result.factors.rank == min(rank, out, into)


@pytest.mark.parametrize("energy", [0.6, 0.9, 1.0])
def test_an_energy_share_of_a_flat_delta_is_exact(energy: float) -> None:
    # the sketch's own values say that it would have to be wider than half the delta
    delta = torch.from_numpy(np.random.default_rng(5).standard_normal((150, 120)))
    result = approximate(delta, energy=energy, stream=STREAM)
    squares = np.linalg.svd(delta.numpy(), compute_uv=False) ** 2
    shares = squares.cumsum() / squares.cumsum()[-1]
    least = int(np.argmax(shares >= energy)) + 1
    assert result.factors.rank == least
    assert error(delta, result) ** 2 == pytest.approx(squares[least:].sum(), rel=1e-10, abs=1e-20)


def test_the_stream_decides_the_bytes() -> None:
    delta = with_values(260, 200, SPECTRA["slow"]).float()
    one, same, other = (approximate(delta, rank=8, stream=Stream.of(seed, "m")) for seed in (1, 1, 2))
    assert torch.equal(one.factors.a_RI, same.factors.a_RI)
    assert torch.equal(one.factors.b_OR, same.factors.b_OR)
    assert not torch.equal(one.factors.a_RI, other.factors.a_RI)


def test_signs_are_fixed_and_factors_balanced() -> None:
    result = approximate(with_values(260, 200, SPECTRA["fast"]), rank=8, stream=STREAM).factors
    largest = result.b_OR.abs().argmax(dim=0)
    assert (result.b_OR[largest, torch.arange(8)] > 0).all()
    torch.testing.assert_close(result.a_RI.norm(dim=1), result.b_OR.norm(dim=0))


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_any_scale_is_as_good(scale: float, dtype: torch.dtype) -> None:
    plain = with_values(260, 200, SPECTRA["slow"])
    want = approximate(plain, rank=8, stream=STREAM).relative_error
    got = approximate((plain * scale).to(dtype), rank=8, stream=STREAM)
    # the first order of float32's rounding of delta and space
    assert got.relative_error == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("shape", [(6, 5), (260, 200)])
@pytest.mark.parametrize("cut", [{"rank": 3}, {"energy": 0.9}])
def test_a_delta_of_zero_has_no_error(shape: tuple[int, int], cut: dict[str, float]) -> None:
    result = approximate(torch.zeros(shape), stream=STREAM, **cut)  # type: ignore[arg-type]
    assert not (result.factors.b_OR @ result.factors.a_RI).any()
    assert (result.energy, result.lost, result.relative_error) == (0, 0, 0)
    assert result.factors.rank == cut.get("rank", 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e160])
@pytest.mark.parametrize("shape", [(6, 5), (260, 200)])
def test_what_is_not_finite_is_refused(value: float, shape: tuple[int, int]) -> None:
    delta = torch.ones(shape, dtype=torch.float64)
    delta[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        approximate(delta, rank=2, stream=STREAM)


@pytest.mark.parametrize("cut", [{}, {"rank": 0}, {"energy": 1.5}, {"rank": 2, "energy": 0.5}])
def test_a_cut_out_of_bounds_is_refused(cut: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"exactly one|must be positive|above 0 and at most 1"):
        approximate(torch.ones(6, 5), stream=STREAM, **cut)  # type: ignore[arg-type]
