"""Judge whether the scores of a sweep only rise, and whether a fall is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from personalized_soups.evaluation.results import Interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """The falls of a sweep.

    Attributes:
        largest_dip: the largest fall of the score from a point to a later point, or 0 if the score never falls.
        dip_at: the weights of the two points of the largest fall, or None if the score never falls.
        is_within_noise: whether, for every fall, the 95% intervals of its two points overlap. It is True if the score
            never falls, and None if the score falls and there are no intervals.
    """

    largest_dip: float
    dip_at: tuple[float, float] | None
    is_within_noise: bool | None

    @property
    def is_monotone(self) -> bool:
        """Whether the score never falls."""
        return self.dip_at is None

    def __str__(self) -> str:
        if self.dip_at is None:
            return "monotone"
        dip = f"largest dip {self.largest_dip:.3f}, from w = {self.dip_at[0]:g} to {self.dip_at[1]:g}"
        if self.is_within_noise is None:
            return f"not strictly monotone: {dip}; no intervals to judge it by"
        return f"monotone within noise: {dip}" if self.is_within_noise else f"not monotone: {dip}"


def judge_sweep(points: Sequence[Sequence[float]], intervals: Sequence[Interval] | None = None) -> Verdict:
    """Return the verdict on whether the score rises with the weight.

    A fall is noise if the intervals of its two points overlap. All pairs of points are compared, not only neighbors,
    because a slow fall may consist of small steps.

    Args:
        points: pairs (weight, score), sorted by weight.
        intervals: the interval of each point's score.
    """
    dip, at = 0.0, None
    is_within_noise: bool | None = True
    for earlier, later in combinations(range(len(points)), 2):
        fall = points[earlier][1] - points[later][1]
        if fall <= 0:
            continue
        if fall > dip:
            dip, at = fall, (points[earlier][0], points[later][0])
        if intervals is None:
            is_within_noise = None
        elif intervals[earlier][0] > intervals[later][1]:
            is_within_noise = False
    return Verdict(dip, at, is_within_noise)
