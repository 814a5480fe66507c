"""Forecast the margins of a soup from those of the base and of each expert alone.

The margin of a pair is how much more likely a policy finds the chosen answer than the rejected answer, as a difference
of log-probabilities. A soup adds up the experts' deltas, so to the first order in the weights it adds up their changes
of the margin:

    margin(soup) = margin(base) + sum_e w_e (margin(expert e alone) - margin(base))

The forecast shows which experts undo each other before any soup is computed. It costs one forward pass of every pair
for each expert and one for the base, whatever the number of soups.

Shapes: N = pairs, E = experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class MarginForecast:
    """The margins of some pairs under the base, and their changes by each expert.

    Attributes:
        names: the names of the E experts.
        base: [N], float64: the margins under the base. With zeros, margins are relative to the base, as in DPO's
            rewards.
        changes: [N, E], float64: the margin under each expert alone, at weight 1, minus that under the base.

    Example:
        >>> forecast = MarginForecast(("warm",), np.array([-1.0, 0.5]), np.array([[2.0], [-1.0]]))
        >>> forecast.margins({"warm": 0.5}).tolist()
        [0.0, 0.0]
        >>> forecast.accuracy({"warm": 1.0})
        0.5
    """

    names: tuple[str, ...]
    base: Floats
    changes: Floats

    def __post_init__(self) -> None:
        if self.base.ndim != 1 or self.changes.shape != (len(self.base), len(self.names)):
            raise ValueError(
                f"base has shape {self.base.shape}, changes has shape {self.changes.shape}, and there are "
                f"{len(self.names)} experts"
            )

    @classmethod
    def of(cls, base_N: npt.ArrayLike, margins: Mapping[str, npt.ArrayLike]) -> MarginForecast:
        """Return the forecast from the margins of the base and, by expert, of each expert alone."""
        base = np.asarray(base_N, dtype=np.float64)
        changes = [np.asarray(margin, dtype=np.float64) - base for margin in margins.values()]
        return cls(tuple(margins), base, np.stack(changes, axis=1) if changes else np.zeros((len(base), 0)))

    def margins(self, weights: Mapping[str, float]) -> Floats:
        """Return [N], float64: the forecast margins of the soup with these weights. Experts left out have weight 0.

        Raises:
            ValueError: if an expert is unknown.
        """
        unknown = sorted(weights.keys() - set(self.names))
        if unknown:
            raise ValueError(f"unknown experts: {', '.join(unknown)}")
        weights_E = np.array([weights.get(name, 0.0) for name in self.names], dtype=np.float64)
        margins_N: Floats = self.base + self.changes @ weights_E
        return margins_N

    def accuracy(self, weights: Mapping[str, float]) -> float:
        """Return the share of pairs whose chosen answer the soup prefers. A margin of 0 counts half."""
        return accuracy(self.margins(weights))


def accuracy(margins_N: npt.ArrayLike) -> float:
    """Return the share of margins above 0. A margin of 0 counts half."""
    margins = np.asarray(margins_N, dtype=np.float64)
    return float(np.mean((margins > 0) + 0.5 * (margins == 0)))
