"""The users-by-pairs matrix of labels.

Shapes: U = users, P = different pairs, N = comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np

from personalized_soups.systems.preference_models import Comparisons, Floats, Indices


@dataclass(frozen=True, slots=True, eq=False)
class LabelMatrix:
    """Which items each user prefers, with one column for each pair of items.

    Attributes:
        labels: [U, P], float64: 1 if the user prefers `a`, 0 if `b`, NaN where the user did not compare the pair. If
            a user compared a pair several times, it is the mean.
        a: [P], int64, the index of the first item of each pair. It is less than the index in `b`.
        b: [P], int64.
    """

    labels: Floats
    a: Indices
    b: Indices

    @classmethod
    def of(cls, comparisons: Comparisons) -> Self:
        """Return the matrix of some comparisons. A pair whose items are in the other order is the same pair."""
        first, second = np.minimum(comparisons.a, comparisons.b), np.maximum(comparisons.a, comparisons.b)
        oriented = np.where(comparisons.a == first, comparisons.labels, 1 - comparisons.labels)
        pairs, column = np.unique(np.stack([first, second]), axis=1, return_inverse=True)
        shape = (comparisons.num_users, pairs.shape[1])
        totals, counts = np.zeros(shape), np.zeros(shape)
        cells = (comparisons.users, column.reshape(-1))
        np.add.at(totals, cells, oriented)
        np.add.at(counts, cells, 1.0)
        means = np.divide(totals, counts, out=np.full(shape, np.nan), where=counts > 0)
        return cls(means, pairs[0], pairs[1])
