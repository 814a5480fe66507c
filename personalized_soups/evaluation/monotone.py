"""Whether a sweep rises all the way, and if it dips, whether that is more than noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from personalized_soups.evaluation.results import Interval


@dataclass(frozen=True, slots=True)
class Verdict:
    """`largest_dip` is the most that the score falls from a point to a later one, between the weights `dip_at`.

    `is_within_noise` is true where every fall lies within its two points' 95% intervals (so for a sweep that never
    falls), and None where it falls and there are no intervals to judge by.
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
    """Return whether the score rises with the weight; `points` are (weight, score) by rising weight.

    A fall counts as noise where the two points' intervals overlap. All pairs are compared, not only neighbours, so
    that a slow fall made of small steps is seen.
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
