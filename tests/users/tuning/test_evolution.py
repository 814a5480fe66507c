"""The evolution finds optima inside and at the edge of its box, whatever single scores are."""

from __future__ import annotations

import math
import warnings

import numpy as np
import numpy.typing as npt
import pytest

from personalized_soups.errors import UsageError
from personalized_soups.users.tuning.evolution import Evolution

Floats = npt.NDArray[np.float64]


def _run(evolution: Evolution, target: Floats, generations: int) -> list[Floats]:
    seen = []
    for _ in range(generations):
        vectors = evolution.ask(evolution.population)
        seen += vectors
        evolution.tell(vectors, np.array([-float(((vector - target) ** 2).sum()) for vector in vectors]))
    return seen


@pytest.mark.parametrize("num", [1, 3, 8])
def test_it_moves_to_the_highest_score(num: int) -> None:
    target = np.linspace(-1.2, 0.9, num)
    evolution = Evolution(np.zeros(num), sigma=0.5, limit=1.5)
    assert evolution.population == 4 + math.floor(3 * math.log(num))
    _run(evolution, target, 60)
    assert np.abs(evolution.mean - target).max() < 1e-2


def test_it_stays_within_the_box() -> None:
    target = np.array([3.0, -3.0])
    evolution = Evolution(np.zeros(2), sigma=0.8, limit=1.5, seed=4)
    seen = _run(evolution, target, 30)
    assert np.abs(np.stack(seen)).max() <= 1.5
    assert np.abs(evolution.mean).max() <= 1.5
    assert evolution.mean == pytest.approx([1.5, -1.5], abs=0.05)


def test_the_seed_decides() -> None:
    first, again, other = (Evolution(np.zeros(3), sigma=0.5, limit=1.5, seed=seed).ask(2) for seed in (7, 7, 8))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, math.inf])
def test_a_score_that_is_not_finite_counts_as_the_lowest(bad: float) -> None:
    def moved(score: float) -> Floats:
        evolution = Evolution(np.zeros(2), sigma=0.5, limit=1.5, population=6)
        vectors = evolution.ask(6)
        evolution.tell(vectors, np.array([5.0, 4.0, 3.0, 2.0, 1.0, score]))
        return evolution.mean

    assert np.array_equal(moved(bad), moved(0.5))


def test_scores_that_are_all_bad_raise_no_error() -> None:
    evolution = Evolution(np.zeros(2), sigma=0.5, limit=1.5, population=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evolution.tell(evolution.ask(4), np.full(4, math.nan))
    assert np.isfinite(evolution.mean).all()


def test_it_tells_when_it_has_converged() -> None:
    evolution = Evolution(np.zeros(2), sigma=0.5, limit=1.5)
    assert not evolution.has_converged
    _run(evolution, np.zeros(2), 200)
    assert evolution.has_converged


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"sigma": 0.0}, "sigma is 0"),
        ({"sigma": math.nan}, "sigma is nan"),
        ({"limit": -1.0}, "limit is -1"),
        ({"limit": math.inf}, "limit is inf"),
        ({"population": 3}, "population is 3, but CMA-ES needs at least 4"),
        ({"limit": 0.5}, "the start has a weight of magnitude 1, but limit is 0.5"),
    ],
)
def test_wrong_numbers_are_told(options: dict[str, float], what: str) -> None:
    with pytest.raises(UsageError, match=what):
        Evolution(np.array([0.2, -1.0]), **{"sigma": 0.5, "limit": 1.5, **options})  # type: ignore[arg-type]


def test_the_smallest_population_works() -> None:
    evolution = Evolution(np.zeros(2), sigma=0.5, limit=1.5, population=4)
    _run(evolution, np.array([0.5, 0.5]), 60)
    assert evolution.mean == pytest.approx([0.5, 0.5], abs=0.05)
