"""Tests of differences between systems that answered the same prompts, and intervals over seeds.

Shapes: P = clusters, such as prompts; N = resamples.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import fsum, sqrt
from statistics import stdev

import numpy as np

# The 97.5% point of Student's t distribution for 1, 2, ... degrees of freedom.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
# With at most this many clusters, all 2^P signs are tried.
_EXACT_CLUSTERS = 12


def t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the mean of the values of some seeds, and half of its 95% t interval.

    Return None for fewer than 2 or more than 10 values, for which the interval is not known.

    Example:
        >>> mean, half = t_interval([1.0, 2.0, 3.0])
        >>> round(mean, 2), round(half, 2)
        (2.0, 2.48)
    """
    if not 2 <= len(values) <= len(_T) + 1:
        return None
    return fsum(values) / len(values), _T[len(values) - 2] * stdev(values) / sqrt(len(values))


def sign_flip_p_value(differences: Sequence[float], *, num_resamples: int = 20_000, seed: int = 0) -> float:
    """Return the two-sided p-value of a mean difference between two systems.

    If the systems are alike, the sign of each cluster's difference is a fair coin (Fisher's randomisation test). The
    p-value is the share of all signs with a mean at least as far from 0. With up to 12 clusters, all signs are tried,
    otherwise `num_resamples` random ones, and the data itself counts as one of them.

    Args:
        differences: for each cluster, such as a prompt, the mean difference of the systems' scores.
        num_resamples: the number of random signs.
        seed: the seed of the random signs.

    Raises:
        ValueError: if there are no differences, or one is not finite.

    Example:
        >>> sign_flip_p_value([0.5, 1.0, 0.2, 0.1])  # all four signs alike: 2 of 16
        0.125
    """
    differences_P = np.asarray(differences, dtype=np.float64)
    if not differences_P.size or not np.isfinite(differences_P).all():
        raise ValueError("differences must be finite numbers, at least one")
    if len(differences_P) <= _EXACT_CLUSTERS:
        signs_NP = np.array(list(itertools.product((1.0, -1.0), repeat=len(differences_P))))
        extra = 0
    else:
        signs_NP = np.random.default_rng(seed).choice([1.0, -1.0], size=(num_resamples, len(differences_P)))
        extra = 1
    sums_N = np.abs(signs_NP @ differences_P)
    observed = abs(float(differences_P.sum()))
    # a sum of the same numbers in another order may differ by rounding
    is_as_far_N = sums_N >= observed - 1e-12 * float(np.abs(differences_P).sum())
    return float(int(is_as_far_N.sum()) + extra) / (len(signs_NP) + extra)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return p-values that are adjusted for the number of comparisons (Holm 1979), in the given order.

    Comparing each adjusted value with alpha keeps the probability of any false finding at most alpha.

    Raises:
        ValueError: if a p-value is not in [0, 1].

    Example:
        >>> holm({"a": 0.01, "b": 0.04, "c": 0.03})
        {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    if not all(0 <= value <= 1 for value in p_values.values()):
        raise ValueError(f"p-values must be in [0, 1], but are {dict(p_values)}")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}
