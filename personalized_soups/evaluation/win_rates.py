"""Estimate how often a user prefers one of two models, with a bootstrap interval.

Shapes: P = prompts, N = resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class WinRate:
    """The share of comparisons that a model wins, and the interval of this share. A tie counts as half a win."""

    rate: float  # in [0, 1]
    low: float  # lower end of the interval
    high: float  # upper end of the interval


def win_rate(
    ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0, num_resamples: int = 2000, level: float = 0.95
) -> WinRate:
    """Return the share of prompts for which `ours` is above `theirs`. A tie counts as half a win.

    The interval is a percentile bootstrap: the prompts are resampled, and each resample gives one share.

    Args:
        ours: one model's value for each prompt.
        theirs: the other model's values for the same prompts.
        seed: random seed of the bootstrap.
        num_resamples: the number of resamples.
        level: the share of resamples inside the interval.

    Raises:
        ValueError: if `ours` and `theirs` differ in length or are empty, or if a value is not finite.
    """
    if len(ours) != len(theirs) or not ours:
        raise ValueError(
            f"`ours` has {len(ours)} values and `theirs` has {len(theirs)}; give both one value for each prompt"
        )
    gap_P = np.asarray(ours, dtype=np.float64) - np.asarray(theirs, dtype=np.float64)
    if not np.isfinite(gap_P).all():
        raise ValueError("`ours` and `theirs` must hold finite values, but a value is NaN or infinite")
    points_P = np.where(gap_P > 0, 1.0, np.where(gap_P < 0, 0.0, 0.5))
    low, high = bootstrap_interval(points_P.tolist(), seed=seed, num_resamples=num_resamples, level=level)
    return WinRate(float(points_P.mean()), low, high)


def bootstrap_interval(
    values: Sequence[float], *, seed: int = 0, num_resamples: int = 2000, level: float = 0.95
) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of the mean of `values`, which has one value for each prompt."""
    values_P = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means_N = values_P[rng.integers(0, len(values_P), size=(num_resamples, len(values_P)))].mean(axis=1)
    low, high = np.quantile(means_N, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
