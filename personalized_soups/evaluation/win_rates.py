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


def ratio_interval(
    parts: Sequence[float],
    wholes: Sequence[float],
    *,
    seed: int = 0,
    num_resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Return the percentile-bootstrap interval of `sum(parts) / sum(wholes)`.

    Each position is a cluster, such as a prompt with several comparisons. A cluster is resampled as a whole, because
    its comparisons are not independent. A resample without any whole is left out.

    Args:
        parts: for each cluster, the number of comparisons that count, e.g. those that were won.
        wholes: for each cluster, the number of comparisons.
        seed: random seed of the bootstrap.
        num_resamples: the number of resamples.
        level: the share of resamples inside the interval.

    Raises:
        ValueError: if the two differ in length, or the sum of `wholes` is not positive.

    Example:
        >>> ratio_interval([2, 0, 1], [2, 0, 1])  # every comparison counts, in whatever sample of prompts
        (1.0, 1.0)
    """
    if len(parts) != len(wholes) or sum(wholes) <= 0:
        raise ValueError(
            f"{len(parts)} parts and {len(wholes)} wholes, of which the sum must be positive, give no ratio"
        )
    parts_P, wholes_P = np.asarray(parts, dtype=np.float64), np.asarray(wholes, dtype=np.float64)
    drawn_NP = np.random.default_rng(seed).integers(0, len(parts_P), size=(num_resamples, len(parts_P)))
    sums_N = wholes_P[drawn_NP].sum(axis=1)
    ratios_N = parts_P[drawn_NP].sum(axis=1)[sums_N > 0] / sums_N[sums_N > 0]
    low, high = np.quantile(ratios_N, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
