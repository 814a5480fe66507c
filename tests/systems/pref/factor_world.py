"""A world of which everything is known: rewards that are linear in 4 hidden features, and users with a weight for each.

Items have 32 features. A user's weights are a normal random vector around (1, 0, 0, 0). 60 users are known, 30 are new.
600 pairs of items have Bernoulli labels of some users each.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from personalized_soups.systems.preference_models import Comparisons

Floats = NDArray[np.float64]

NUM_FEATURES, NUM_HIDDEN, NUM_KNOWN, NUM_NEW, NUM_PAIRS = 32, 4, 60, 30, 600
NUM_POOL, NUM_TEST = 400, 500


@dataclass(frozen=True)
class FactorWorld:
    """comparisons: of the known users; rewards: [F, U], each user's true reward, the known users first;
    pool, test: [Q, F], differences of the features of two items, for questions to new users and for held-out pairs."""

    comparisons: Comparisons
    rewards: Floats
    pool: Floats
    test: Floats

    @property
    def known(self) -> range:
        return range(NUM_KNOWN)

    @property
    def new(self) -> range:
        return range(NUM_KNOWN, NUM_KNOWN + NUM_NEW)

    def auc(self, user: int, weights_F: Floats) -> float:
        """Return the ROC-AUC on held-out pairs with noise-free labels: the chance that the margin of a pair whose `a`
        is better exceeds the margin of a pair whose `b` is better."""
        margins, is_a = self.test @ weights_F, self.test @ self.rewards[:, user] > 0
        return float(np.mean(margins[is_a][:, None] > margins[~is_a][None, :]))


def make_world(seed: int, *, labels_per_pair: int = 10) -> FactorWorld:
    rng = np.random.default_rng(seed)
    # a hidden feature has the standard deviation 2
    hidden_FR = 2 * rng.standard_normal((NUM_FEATURES, NUM_HIDDEN)) / np.sqrt(NUM_FEATURES)
    weights_UR = rng.standard_normal((NUM_KNOWN + NUM_NEW, NUM_HIDDEN))
    weights_UR[:, 0] += 1
    rewards_FU = hidden_FR @ weights_UR.T
    features = rng.standard_normal((2 * NUM_PAIRS, NUM_FEATURES))
    a = np.repeat(np.arange(NUM_PAIRS), labels_per_pair)
    b = a + NUM_PAIRS
    users = np.concatenate([rng.choice(NUM_KNOWN, labels_per_pair, replace=False) for _ in range(NUM_PAIRS)])
    margins = np.einsum("nf,fn->n", features[a] - features[b], rewards_FU[:, users])
    labels = rng.random(len(a)) < 1 / (1 + np.exp(-margins))
    pool = rng.standard_normal((NUM_POOL, NUM_FEATURES)) - rng.standard_normal((NUM_POOL, NUM_FEATURES))
    test = rng.standard_normal((NUM_TEST, NUM_FEATURES)) - rng.standard_normal((NUM_TEST, NUM_FEATURES))
    return FactorWorld(Comparisons(features, a, b, labels, users), rewards_FU, pool, test)
