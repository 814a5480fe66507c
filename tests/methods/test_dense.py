"""Every dense method against loops over elements in float64, PEFT's functions and mergekit's formulas."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import peft.utils.merge_utils as peft_rules
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from personalized_soups.methods import dense
from personalized_soups.methods.sparsify import drop, drop_small
from personalized_soups.methods.streams import Stream

Matrix = NDArray[np.float64]

# One rounding of a product, one of each sum, one of the quotient: half an ulp each, E = 3 experts. Dyadic entries make
# the sums that elect exact, so that no sign hangs on a rounding.
ULP = 2.0**-24
RTOL = 6 * ULP
STREAMS = [Stream.of(7, name) for name in "abc"]
WEIGHTS = [[1.0, 1.0, 1.0], [0.75, 0.25, 0.125], [0.5, -1.0, 0.25], [-1.0, -0.5, -0.25], [1.0, -1.0, 0.0]]


def dyadic(seed: int, shape: tuple[int, int] = (13, 11)) -> Tensor:
    """Quarters from -2 to 2: many zeros, many equal magnitudes, exact sums."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 4


def f64(tensor: Tensor) -> Matrix:
    matrix: Matrix = tensor.double().numpy()
    return matrix


def trimmed(delta: Matrix, density: float, at_least: int = 0) -> Matrix:
    k = max(at_least, int(density * delta.size))
    if k == 0:
        return np.zeros_like(delta)
    least = np.sort(np.abs(delta).ravel())[::-1][k - 1]
    return np.where(np.abs(delta) >= least, delta, 0)


def elected(
    parts: Sequence[Matrix], weights: Sequence[float], *, on: Sequence[float], count: Callable[[float], float]
) -> Matrix:
    """`sum_agree w t / sum_agree count(w)`, sign of `sum on t` elected, element by element."""
    out = np.zeros_like(parts[0])
    for index in np.ndindex(out.shape):
        sign = 1 if sum(u * part[index] for u, part in zip(on, parts, strict=True)) >= 0 else -1
        agree = [e for e, part in enumerate(parts) if np.sign(on[e] * part[index]) == sign]
        divisor = sum(count(weights[e]) for e in agree)
        out[index] = sum(weights[e] * parts[e][index] for e in agree) / (divisor or 1)
    return out


def masked(deltas: Sequence[Tensor], keep: Callable[[Stream], Any]) -> list[Matrix]:
    return [f64(keep(stream)(delta, 0)) for delta, stream in zip(deltas, STREAMS, strict=True)]


def l1(part: Matrix, delta: Matrix) -> Matrix:
    scale = float(np.abs(delta).sum() / np.abs(part).sum())
    return part * scale


def want(name: str, deltas: Sequence[Tensor], w: Sequence[float], density: float, lambda_: float) -> Matrix:
    """The formulas of algorithms.md, and of mergekit's and PEFT's sources, once more and slowly."""
    exact = [f64(delta) for delta in deltas]
    trims = [trimmed(delta, density) for delta in exact]
    drops = masked(deltas, lambda stream: drop(density, stream))
    dared = [part / density for part in drops]
    ones = [1.0] * len(w)
    rules: dict[str, Callable[[], Any]] = {
        "magnitude_prune": lambda: sum(e * t for e, t in zip(w, trims, strict=True)),
        "dare_linear": lambda: sum(e * t for e, t in zip(w, dared, strict=True)),
        "dare_linear_mergekit": lambda: sum(e * l1(t, d) for e, t, d in zip(w, drops, exact, strict=True)),
        "ties": lambda: lambda_ * elected(trims, w, on=w, count=abs),
        "ties_peft": lambda: elected(trims, w, on=ones, count=lambda _: 1.0),
        "ties_mergekit": lambda: lambda_ * elected([trimmed(d, density, 1) for d in exact], w, on=w, count=float),
        "dare_ties": lambda: lambda_ * elected(dared, w, on=w, count=abs),
        "dare_ties_peft": lambda: elected(dared, w, on=ones, count=lambda _: 1.0),
    }
    found: Matrix = rules[name]()
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", [0.005, 0.25, 0.5, 1.0])
@pytest.mark.parametrize(
    "name",
    ["magnitude_prune", "dare_linear", "dare_linear_mergekit", "ties", "ties_peft", "ties_mergekit", "dare_ties",
     "dare_ties_peft"],
)  # fmt: skip
def test_against_loops_over_elements(name: str, density: float, weights: list[float]) -> None:
    if name == "dare_linear_mergekit" and density < 0.01:
        pytest.skip("nothing is kept of so small a matrix, and there is no norm to match")
    deltas = [dyadic(seed) for seed in range(3)]
    options: dict[str, Any] = {"density": density}
    lambda_ = 1.0
    if name in {"ties", "ties_mergekit", "dare_ties"}:
        options["lambda_"] = lambda_ = 0.75
    if name.startswith("dare"):
        options["streams"] = STREAMS
    got = getattr(dense, name)(deltas, weights, **options)
    expected = want(name, deltas, weights, density, lambda_)
    # in addition to each term's own rounding, the errors of terms that cancel, bounded by the sum of magnitudes:
    # at most 3 * 2 / density
    np.testing.assert_allclose(f64(got), expected, rtol=RTOL, atol=RTOL * 6 / density)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("name", ["dare_ties_mergekit", "della", "della_mergekit"])
def test_rescaled_elections_against_loops(name: str, weights: list[float]) -> None:
    # entries of all magnitudes: sums that elect are never so near 0 that a rounding could turn them (asserted below)
    deltas = [torch.randn(16, 12, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    density, epsilon, lambda_ = 0.5, 0.25, 1.5
    options: dict[str, Any] = {"density": density, "lambda_": lambda_, "streams": STREAMS}
    if name == "dare_ties_mergekit":
        parts = masked(deltas, lambda stream: drop(density, stream))
    else:
        options["epsilon"] = epsilon
        parts = masked(deltas, lambda stream: drop_small(density, epsilon, stream, rescales=name == "della"))
    if name != "della":
        parts = [l1(part, f64(delta)) for part, delta in zip(parts, deltas, strict=True)]
    sums = np.abs(sum(w * part for w, part in zip(weights, parts, strict=True)))
    assert sums[sums > 0].min() > 1e-5
    count: dict[str, Callable[[float], float]] = {"della": abs, "della_mergekit": float}
    expected = lambda_ * elected(parts, weights, on=weights, count=count.get(name, lambda _: 0.0))
    got = getattr(dense, name)(deltas, weights, **options)
    # one more rounding for the scale, and the sum of magnitudes is below 3 * 10
    np.testing.assert_allclose(f64(got), expected, rtol=2 * RTOL, atol=RTOL * 30)


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [0.75, 0.25, 0.125], [0.5, -1.0, 0.25]])
@pytest.mark.parametrize("density", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("rule", ["magnitude_prune", "ties", "dare_linear", "dare_ties"])
def test_against_peft(monkeypatch: pytest.MonkeyPatch, rule: str, density: float, weights: list[float]) -> None:
    # no two magnitudes are equal, so PEFT's choice among equals does not matter
    deltas = [torch.randn(20, 15, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    masks = iter([(drop(density, stream)(torch.ones(20, 15), 0)) for stream in STREAMS])
    monkeypatch.setattr(torch, "bernoulli", lambda *_args, **_kwargs: next(masks))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The density 1.0 is greater than or equal to 1")
        expected = getattr(peft_rules, rule)(deltas, torch.tensor(weights), density)
    ours = {"magnitude_prune": "magnitude_prune", "dare_linear": "dare_linear"}.get(rule, f"{rule}_peft")
    streams = {"streams": STREAMS} if rule.startswith("dare") else {}
    got = getattr(dense, ours)(deltas, weights, density=density, **streams)
    # both round in float32: twice the bound of one, the sum of magnitudes below 3 * 4 / density
    torch.testing.assert_close(got, expected, rtol=2 * RTOL, atol=2 * RTOL * 12 / density)


def test_peft_and_mergekit_agree_at_equal_weights_and_differ_otherwise() -> None:
    deltas = [torch.randn(60, 50, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    names = ("ties", "ties_peft", "ties_mergekit")

    def merged(weights: list[float]) -> list[Tensor]:
        lambdas: list[dict[str, float]] = [{"lambda_": 1.0}, {}, {"lambda_": 1.0}]
        return [
            getattr(dense, name)(deltas, weights, density=0.5, **extra)
            for name, extra in zip(names, lambdas, strict=True)
        ]

    ours, peft, mergekit = merged([1.0, 1.0, 1.0])
    assert torch.equal(ours, peft)
    assert torch.equal(ours, mergekit)
    ours, peft, mergekit = merged([0.7, 0.2, 0.1])
    torch.testing.assert_close(ours, mergekit)
    assert float((peft - ours).norm() / ours.norm()) > 0.5
    ours, _, mergekit = merged([-0.7, -0.2, -0.1])
    torch.testing.assert_close(ours, -mergekit)  # the signed divisor turns negatively weighted experts around


def test_thresholds_trim_over_the_whole_model() -> None:
    small, large = dyadic(0), 4 * dyadic(1)
    everything = np.concatenate([f64(small).ravel(), f64(large).ravel()])
    least = float(np.sort(np.abs(everything))[::-1][int(0.5 * everything.size) - 1])
    for delta in (small, large):
        got = dense.ties_paper([delta], [1.0], density=0.5, lambda_=1.0, thresholds=[least])
        np.testing.assert_array_equal(f64(got), np.where(np.abs(f64(delta)) >= least, f64(delta), 0))
    alone = dense.ties_paper([small, large], [0.5, 0.25], density=0.5, lambda_=1.0)
    assert torch.equal(alone, dense.ties([small, large], [0.5, 0.25], density=0.5, lambda_=1.0))


def test_opposite_entries_elect_plus() -> None:
    one = torch.tensor([[1.0, -1.0, 0.0]])
    for name in ("ties", "ties_mergekit"):
        got = getattr(dense, name)([one, -one], [1.0, 1.0], density=1.0, lambda_=1.0)
        assert torch.equal(got, torch.tensor([[1.0, 1.0, 0.0]]))
    assert torch.equal(dense.ties_peft([one, -one], [1.0, 1.0], density=1.0), torch.tensor([[1.0, 1.0, 0.0]]))


def test_a_common_scale_of_the_weights_has_no_effect_at_any_magnitude() -> None:
    deltas = [dyadic(seed) for seed in range(3)]
    once = dense.ties(deltas, [0.5, -0.25, 1.0], density=0.5, lambda_=1.0)
    for scale in (2.0**-140, 2.0**99):
        scaled = [weight * scale for weight in (0.5, -0.25, 1.0)]
        assert torch.equal(dense.ties(deltas, scaled, density=0.5, lambda_=1.0), once)
    assert not dense.ties(deltas, [0.0, 0.0, 0.0], density=0.5, lambda_=1.0).any()


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_dare_is_linear_in_expectation(density: float) -> None:
    """Over n seeds an entry's mean has the variance `sum (w d)^2 (1 - density) / density / n`.

    Six standard deviations of a nearly normal mean are exceeded once in 5e8 entries; there are 600 here.
    """
    deltas = [torch.randn(20, 30, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    weights, num_seeds = [0.75, -0.5], 400
    total = torch.zeros(20, 30, dtype=torch.float64)
    for seed in range(num_seeds):
        streams = [Stream.of(seed, name) for name in "ab"]
        total += dense.dare_linear(deltas, weights, density=density, streams=streams)
    expected = sum(w * d.double() for w, d in zip(weights, deltas, strict=True))
    variance = sum((w * d.double()) ** 2 for w, d in zip(weights, deltas, strict=True)) * (1 - density) / density
    bound = 6 * (variance / num_seeds) ** 0.5
    assert ((total / num_seeds - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    deltas = [torch.randn(30, 20, generator=torch.Generator().manual_seed(seed)).to(dtype) for seed in range(3)]
    weights = [0.7, 0.2, -0.4]
    got = dense.ties(deltas, weights, density=0.5, lambda_=1.0)
    assert got.dtype == dtype
    assert torch.equal(got, dense.ties([d.float() for d in deltas], weights, density=0.5, lambda_=1.0).to(dtype))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    deltas = [torch.randn(50, 40, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    turned = [delta.T for delta in deltas]  # not contiguous
    options: dict[str, Any] = {"density": 0.5, "epsilon": 0.1, "lambda_": 1.0, "streams": STREAMS}

    def merged() -> list[Tensor]:
        return [method(parts, [0.5, 0.25, -1.0], **options)
                for method in (dense.della, dense.della_mergekit) for parts in (deltas, turned)]  # fmt: skip

    whole = merged()
    monkeypatch.setattr("personalized_soups.methods.blocks._BLOCK", {"cpu": 100})
    assert all(torch.equal(one, other) for one, other in zip(whole, merged(), strict=True))


def test_what_is_refused() -> None:
    one = torch.ones(2, 3)
    with pytest.raises(ValueError, match="no deltas"):
        dense.magnitude_prune([], [], density=0.5)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        dense.magnitude_prune([one], [1.0, 2.0], density=0.5)
    with pytest.raises(ValueError, match=r"zip\(\)"):
        dense.dare_linear([one, one], [1.0, 2.0], density=0.5, streams=STREAMS)
    with pytest.raises(ValueError, match="one shape and dtype"):
        dense.magnitude_prune([one, one.T], [1.0, 2.0], density=0.5)
    with pytest.raises(ValueError, match="one shape and dtype"):
        dense.magnitude_prune([one, one.double()], [1.0, 2.0], density=0.5)
    with pytest.raises(ValueError, match="must be matrices"):
        dense.magnitude_prune([torch.ones(2, 3, 4)], [1.0], density=1.0)
