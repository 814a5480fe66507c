"""Predict how often a user prefers the answers of the user's soup to those of the base.

Shapes: P = prompts, D = base rewards, S = samples.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from personalized_soups.users.answers.estimate import Estimate, sigmoid


class WinRate(NamedTuple):
    """A predicted win rate.

    Attributes:
        mean: the mean win rate, in [0, 1].
        low: the lower end of the interval.
        high: the upper end of the interval.
    """

    mean: float
    low: float
    high: float


def predicted_win_rate(
    estimate: Estimate, differences_PD: npt.ArrayLike, *, level: float = 0.9, num_samples: int = 2000, seed: int = 0
) -> WinRate:
    """Return the share of prompts for which the user prefers the first of two answers, with an interval.

    Each sample draws the user's weights from the estimate and the prompts with replacement (a bootstrap). So the
    interval counts both the uncertain weights and the small number of prompts.

    Args:
        estimate: the estimate of the user's weights.
        differences_PD: `phi(answer of the soup) - phi(answer of the base)` for each prompt.
        level: the probability of the interval, in (0, 1).
        num_samples: S.
        seed: the seed of the samples.

    Raises:
        ValueError: if there are no prompts.
    """
    differences = np.asarray(differences_PD, dtype=np.float64)
    if not len(differences):
        raise ValueError("a win rate needs at least one prompt")
    rng = np.random.default_rng(seed)
    probabilities_SP = sigmoid(estimate.samples(num_samples, rng) @ differences.T)
    drawn = rng.integers(len(differences), size=(num_samples, len(differences)))
    rates = np.take_along_axis(probabilities_SP, drawn, axis=1).mean(axis=1)
    low, high = np.quantile(rates, [(1 - level) / 2, (1 + level) / 2])
    return WinRate(float(probabilities_SP.mean()), float(low), float(high))
