"""Pareto fronts of the mixtures of a system: between two sides, and over all sides of a combination.

If two sides have one scorer, the scores of a valid answer towards them add up to 1. So the front between them lies on
the diagonal or below, and k mixtures along it dominate at most (1 - 1 / (k - 1)) / 2: a system with mixtures between
the ends has more than one with the ends only. Over the wanted sides of a combination, good ends alone dominate much.

Shapes: M = mixtures, P = prompts, S = sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.evaluation.fronts import hypervolume, pareto_front
from personalized_soups.evaluation.results import Interval
from personalized_soups.evaluation.scores import Graded

Floats = npt.NDArray[np.float64]
_RESAMPLES = 200
# The exact hypervolume of many mixtures in more dimensions takes too long.
MOST_OBJECTIVES = 4


@dataclass(frozen=True, slots=True)
class Mixture:
    """One mixture of a system.

    Attributes:
        shares: the share of each side; those of a dimension add up to 1.
        graded: its answers. All mixtures answer the same prompts in the same order.
    """

    shares: Mapping[str, float]
    graded: Sequence[Graded]


class Front(TypedDict):
    """The mixtures of a system between two sides: their mean scores towards both, and the hypervolume above 0.

    `is_opposed` says whether both sides have one scorer, so that their scores add up to 1.
    """

    system: str
    sides: Sequence[str]
    is_opposed: bool
    points: Sequence[Sequence[float]]
    hypervolume: float
    interval: Interval


class Reach(TypedDict):
    """The hypervolume above 0 over the wanted sides of a combination, averaged over the combinations."""

    system: str
    num_mixtures: int
    hypervolume: float
    interval: Interval


def fronts_of(system: str, mixtures: Sequence[Mixture], catalogue: Catalogue, *, num_seeds: int = 1) -> list[Front]:
    """Return the front of a system between any two sides of a dimension.

    Mixtures with the same share of the two sides count as one: their scores are averaged over the sides of the other
    dimensions for which there is every share.

    Args:
        system: the system's name.
        mixtures: its mixtures.
        catalogue: the dimensions and their sides.
        num_seeds: the number of seeds whose answers follow each other in the answers of a mixture.
    """
    found = []
    for dimension in catalogue.dimensions.values():
        sides = list(dimension.sides)
        for at, first in enumerate(sides):
            for last in sides[at + 1 :]:
                scores_MPS = _between(mixtures, first, last, num_seeds)
                if scores_MPS is None:
                    continue
                value, interval = _with_interval(scores_MPS, [(0, 1)])
                points = scores_MPS.mean(axis=1).tolist()
                front: Front = {
                    "system": system,
                    "sides": [first, last],
                    "is_opposed": catalogue.scorer_of(first) == catalogue.scorer_of(last)
                    and dimension.sides[first].end != dimension.sides[last].end,
                    "points": points,
                    "hypervolume": value,
                    "interval": interval,
                }
                found.append(front)
    return found


def reach_of(
    system: str, mixtures: Sequence[Mixture], combinations: Sequence[Sequence[str]], *, num_seeds: int = 1
) -> Reach:
    """Return how much of the scores towards the sides of a combination the mixtures of a system dominate.

    The cost grows with the number of dimensions as a power: leave it out above `MOST_OBJECTIVES`.
    """
    sides = list(dict.fromkeys(side for combination in combinations for side in combination))
    distinct = {tuple(sorted((side, share) for side, share in each.shares.items() if share)): each for each in mixtures}
    scores_MPS = np.array([_scores(each.graded, sides, num_seeds) for each in distinct.values()])
    places = [tuple(sides.index(side) for side in combination) for combination in combinations]
    value, interval = _with_interval(scores_MPS, places)
    return {"system": system, "num_mixtures": len(distinct), "hypervolume": value, "interval": interval}


def _between(mixtures: Sequence[Mixture], first: str, last: str, num_seeds: int) -> Floats | None:
    """Return [M, P, 2], the scores towards both sides of each share, averaged over the other dimensions.

    Return None if there is no mixture of these sides.
    """
    by_share: dict[float, dict[tuple[tuple[str, float], ...], Floats]] = {}
    for mixture in mixtures:
        own = mixture.shares.get(first, 0.0) + mixture.shares.get(last, 0.0)
        others = {side: share for side, share in mixture.shares.items() if side not in (first, last) and share}
        if abs(own - 1) < 1e-9 and all(share == 1 for share in others.values()):
            context = tuple(sorted(others.items()))
            share = round(mixture.shares.get(last, 0.0), 9)
            by_share.setdefault(share, {})[context] = _scores(mixture.graded, (first, last), num_seeds)
    if not by_share:
        return None
    common = set.intersection(*(set(by_context) for by_context in by_share.values()))
    if not common:
        return None
    return np.array([np.mean([by_share[share][each] for each in common], axis=0) for share in sorted(by_share)])


def _scores(graded: Sequence[Graded], sides: Sequence[str], num_seeds: int) -> Floats:
    """Return [P, S], the means over the seeds."""
    every = np.array([[entry.toward[side] for side in sides] for entry in graded])
    means_PS: Floats = every.reshape(num_seeds, -1, len(sides)).mean(axis=0)
    return means_PS


def _with_interval(scores_MPS: Floats, places: Sequence[tuple[int, ...]]) -> tuple[float, list[float]]:
    """Return the mean hypervolume over some groups of sides, and its 95% bootstrap interval over prompts."""

    def volume(of_prompts: Floats) -> float:
        means_MS = of_prompts.mean(axis=1)
        each = []
        for group in places:
            points = means_MS[:, list(group)]
            each.append(hypervolume(pareto_front(points), np.zeros(len(group))))
        return fsum(each) / len(each)

    num_prompts = scores_MPS.shape[1]
    rng = np.random.default_rng(0)
    drawn = [volume(scores_MPS[:, rng.integers(0, num_prompts, num_prompts)]) for _ in range(_RESAMPLES)]
    return volume(scores_MPS), [float(end) for end in np.quantile(drawn, [0.025, 0.975])]
