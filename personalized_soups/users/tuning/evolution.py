"""CMA-ES (Hansen, arXiv:1604.00772), as the package `cmaes` computes it, for scores of which higher is better.

Shapes: P = candidates of a generation, X = coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from personalized_soups.errors import UsageError, check_extra
from personalized_soups.users.tuning.objective import Floats


class Evolution:
    """A normal distribution of vectors in a box, which moves toward the vectors with the highest scores.

    Args:
        mean_X: where the search starts.
        sigma: the standard deviation of the first generation.
        limit: the box is [-limit, limit] in every coordinate.
        population: the number of candidates of a generation. By default 4 + 3 ln X, rounded down (Hansen, eq. 48).
        seed: the seed of the random numbers.

    Raises:
        UsageError: if the package `cmaes` is not installed, a number is out of range, or the start is outside the box.
    """

    def __init__(
        self, mean_X: Floats, *, sigma: float, limit: float, population: int | None = None, seed: int = 0
    ) -> None:
        check_extra("search", "cmaes")
        _check_numbers(sigma, limit, population)
        if np.abs(mean_X).max() > limit:
            raise UsageError(
                f"the start has a weight of magnitude {np.abs(mean_X).max():g}, but limit is {limit:g}",
                where="start",
                mend=f"give a start within the limit, or limit={np.abs(mean_X).max():g}",
            )
        from cmaes import CMA

        box = np.array([[-limit, limit]] * len(mean_X))
        self._cma = CMA(mean=mean_X, sigma=sigma, bounds=box, seed=seed, population_size=population)
        self._box = limit

    @property
    def population(self) -> int:
        """The number P of candidates of a generation."""
        return int(self._cma.population_size)

    @property
    def mean(self) -> Floats:
        """The mean [X] of the distribution, moved into the box."""
        return np.clip(np.asarray(self._cma.mean, dtype=np.float64), -self._box, self._box)

    @property
    def has_converged(self) -> bool:
        """Whether further generations would bring nothing, by the criteria of the package `cmaes`."""
        return bool(self._cma.should_stop())

    def ask(self, count: int) -> list[Floats]:
        """Return so many new vectors [X]."""
        return [np.asarray(self._cma.ask(), dtype=np.float64) for _ in range(count)]

    def tell(self, vectors: Sequence[Floats], scores_P: Floats) -> None:
        """Move the distribution toward the vectors of one generation that have the highest scores.

        A score that is not finite counts as the lowest score of the generation.
        """
        finite = scores_P[np.isfinite(scores_P)]
        lowest = finite.min() if len(finite) else 0.0
        losses = -np.where(np.isfinite(scores_P), scores_P, lowest)
        self._cma.tell([(vector, float(loss)) for vector, loss in zip(vectors, losses, strict=True)])


def _check_numbers(sigma: float, limit: float, population: int | None) -> None:
    for name, value in (("sigma", sigma), ("limit", limit)):
        if not 0 < value < np.inf:
            raise UsageError(
                f"{name} is {value:g}, but must be a finite number above 0", where=name, mend=f"give {name}=0.5"
            )
    if population is not None and population < 4:
        raise UsageError(
            f"population is {population}, but CMA-ES needs at least 4 candidates in a generation",
            where="population",
            mend="give population=8, or leave it out",
        )
