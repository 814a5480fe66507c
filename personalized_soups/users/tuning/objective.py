"""`Objective`: how well candidate weights fit a user's data. The search needs no gradient of it.

Shapes: C = candidates, N = items of the user's data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from personalized_soups.declare.expert_weights import ExpertWeights

Floats: TypeAlias = npt.NDArray[np.float64]


class Objective(Protocol):
    """A measure of candidates on each item of a user's data: an example, or a prompt with the answer of the candidate.

    `TextLikelihood` and `ScoredAnswers` are objectives. A judge is another: it answers the prompts with the weights of
    each candidate, compares each answer with a fixed one, for example that of the base, and returns 1 for a better
    answer, 0.5 for a tie and 0 for a worse one.

    Example:
        >>> import numpy
        >>> class FewExperts:
        ...     name, num_items = "few experts", 1
        ...
        ...     def scores(self, candidates, items, *, draw):
        ...         return numpy.array([[-len(each.weights)] * len(items) for each in candidates], dtype=numpy.float64)
        >>> objective: Objective = FewExperts()
        >>> objective.scores([ExpertWeights({"concise": 1.0}), ExpertWeights()], [0], draw=0).tolist()
        [[-1.0], [0.0]]
    """

    @property
    def name(self) -> str:
        """What is measured, in a few words, for tables."""
        ...

    @property
    def num_items(self) -> int:
        """The number N of items."""
        ...

    def scores(self, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Floats:
        """Return [C, N], float64: the score of each candidate on each of the given items. Higher is better.

        Args:
            candidates: the weights of each candidate.
            items: the indices of the items.
            draw: which random numbers are used. All candidates and all calls with equal draws must get the same
                random numbers, so that luck does not decide between two candidates.
        """
        ...
