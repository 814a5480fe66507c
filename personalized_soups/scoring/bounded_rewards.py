"""`BoundedRewards`: base rewards that are squashed into (-1, 1).

An implicit reward is a log-ratio of probabilities, so it has no bounds. An answer with broken text has an extreme
reward from every expert, although no user cares for it that much. Such an answer dominates the margins of a linear
model, and the rules that choose questions prefer just these answers. Tastes saturate: an answer is at most as friendly
as the friendliest one. So each reward is squashed by a tanh, whose centre and scale fit typical answers.

Shapes: N = items, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from personalized_soups.scoring.base_rewards import BaseRewards

Item = TypeVar("Item")
Floats = npt.NDArray[np.float64]

# The share of typical answers whose distance from the centre is less than the scale. tanh is nearly linear for them.
_TYPICAL = 0.7


class BoundedRewards(Generic[Item]):
    """The rewards `tanh((r - centre) / scale)` of other base rewards r.

    Args:
        rewards: the base rewards r.
        centres: [D], the value of each reward that becomes 0.
        scales: [D], greater than 0: the distance from the centre at which a reward becomes tanh(1) = 0.76.

    Raises:
        ValueError: if the shapes do not fit, or a scale is not greater than 0.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> rewards = BoundedRewards(ImplicitRewards(model), centres=[0.0] * 6, scales=[4.0] * 6)
        >>> features = rewards.features([TextItem("How do I clean a lamp?", "Dust the lamp.")])
        >>> bool(abs(features).max() < 1)
        True
    """

    def __init__(self, rewards: BaseRewards[Item], *, centres: npt.ArrayLike, scales: npt.ArrayLike) -> None:
        self._rewards = rewards
        self.centres = np.asarray(centres, dtype=np.float64)
        self.scales = np.asarray(scales, dtype=np.float64)
        shape = (len(rewards.names),)
        if self.centres.shape != shape or self.scales.shape != shape:
            raise ValueError(f"centres {self.centres.shape} and scales {self.scales.shape} must have the shape {shape}")
        if not ((self.scales > 0) & np.isfinite(self.scales) & np.isfinite(self.centres)).all():
            raise ValueError("centres must be finite, and scales must be finite and greater than 0")

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the base rewards."""
        return self._rewards.names

    @cached_property
    def digest(self) -> str:
        """A hex digest of the digest of the base rewards, the centres and the scales."""
        content = (b"bounded 1", self._rewards.digest.encode(), self.centres.tobytes(), self.scales.tobytes())
        return blake3(b"\0".join(content)).hexdigest()

    def features(self, items: Sequence[Item], /) -> Floats:
        """Return [N, D], float64: each reward of each item, in (-1, 1).

        Raises:
            SoupError: if the base rewards raise it.
        """
        return self.bounded(self._rewards.features(items))

    def bounded(self, features_ND: npt.ArrayLike) -> Floats:
        """Return the rewards of items whose base rewards are known, [N, D], float64."""
        return bounded(features_ND, self.centres, self.scales)


def bounded(features_ND: npt.ArrayLike, centres_D: npt.ArrayLike, scales_D: npt.ArrayLike) -> Floats:
    """Return `tanh((r - centre) / scale)`, [N, D], float64."""
    features = np.asarray(features_ND, dtype=np.float64)
    squashed: Floats = np.tanh((features - np.asarray(centres_D)) / np.asarray(scales_D))
    return squashed


def typical_bounds(features_ND: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return the centre and the scale of each reward, [D] and [D], for the rewards of typical answers.

    The centre is the median, and the scale is the distance from it within which 70% of the answers are. Neither depends
    on how extreme the rest is. A reward that is equal for most answers has the scale 1.

    Args:
        features_ND: the base rewards of N typical answers, at least one.
    """
    features = np.asarray(features_ND, dtype=np.float64)
    centres = np.median(features, axis=0)
    scales = np.quantile(np.abs(features - centres), _TYPICAL, axis=0)
    return centres, np.where(scales > 0, scales, 1.0)
