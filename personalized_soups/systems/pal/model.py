"""`PalModel`: the shared part of PAL with the mixtures of known users; a new user's mixture is fitted.

Shapes: U = users, M = items, F = features of an item, K = prototypes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personalized_soups.systems.pal.networks import SharedPart
from personalized_soups.systems.preference_models import Comparisons, Floats


@dataclass(frozen=True, slots=True, eq=False)
class PalReward:
    """The reward of the user with one mixture of the prototypes.

    Attributes:
        shared: the part that all users share.
        mixture: [K], at least 0 and with the sum 1, on the device of the shared part.
        scale: divides the features.
    """

    shared: SharedPart
    mixture: Tensor
    scale: float

    def rewards(self, features_MF: Floats) -> Floats:
        """Return [M], float64: the reward of each item."""
        features = torch.as_tensor(
            np.asarray(features_MF) / self.scale, dtype=self.mixture.dtype, device=self.mixture.device
        )
        with torch.no_grad():
            rewards = self.shared.rewards(features, self.mixture.expand(len(features), -1))
        return np.asarray(rewards.cpu().numpy(), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class PalModel:
    """The shared part of PAL, with the mixtures of known users.

    Attributes:
        shared: the part that all users share. It is not changed for new users.
        logits: [U, K], float32, the logits of the known users' mixtures.
        scale: divides the features.
        new_user_steps: the number of steps of Adam in the fit of a new user's mixture, over all comparisons at once.
        new_user_rate: the learning rate of this fit.
        losses: the loss of each training step.
    """

    shared: SharedPart
    logits: Tensor
    scale: float
    new_user_steps: int
    new_user_rate: float
    losses: tuple[float, ...]

    def known_user(self, user: int) -> PalReward:
        """Return the reward of a user of the training data."""
        return PalReward(self.shared, torch.softmax(self.logits[user], dim=-1), self.scale)

    def new_user(self, comparisons: Comparisons) -> PalReward:
        """Return the reward of a new user. Only the user's mixture is fitted. Ties are left out.

        Without comparisons, the mixture is the mean of the known users'. Otherwise, the fit starts at the mixture of
        the known user who explains the comparisons best. From another start, a few comparisons may leave the mixture
        half way between two prototypes, because the hinge has no slope beyond its margin. The reference code starts at
        normal random numbers.
        """
        preferred, other = oriented(comparisons, self.scale, like=self.logits)
        start = self._start(preferred, other).clamp(min=torch.finfo(self.logits.dtype).tiny)
        # the derivative by the shared part is not needed, so no parameter collects one
        logits = start.log().requires_grad_()
        optimiser = torch.optim.Adam([logits], lr=self.new_user_rate)
        for _ in range(self.new_user_steps if len(preferred) else 0):
            mixture = torch.softmax(logits, dim=-1).expand(len(preferred), -1)
            margins = self.shared.rewards(preferred, mixture) - self.shared.rewards(other, mixture)
            (logits.grad,) = torch.autograd.grad(self.shared.loss(margins), [logits])
            optimiser.step()
        return PalReward(self.shared, torch.softmax(logits.detach(), dim=-1), self.scale)

    def _start(self, preferred: Tensor, other: Tensor) -> Tensor:
        """Return the mixture [K] at which the fit of a new user starts."""
        known_UK = torch.softmax(self.logits, dim=-1)
        if not len(preferred):
            return known_UK.mean(dim=0)
        losses = []
        with torch.no_grad():
            for mixture_K in known_UK:
                rows = mixture_K.expand(len(preferred), -1)
                margins = self.shared.rewards(preferred, rows) - self.shared.rewards(other, rows)
                losses.append(float(self.shared.loss(margins)))
        return known_UK[int(np.argmin(losses))]


def oriented(comparisons: Comparisons, scale: float, *, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features [N, F] of the preferred items and of the others, divided by `scale`, without ties.

    Both have the dtype and device of `like`.
    """
    decided = comparisons.at(comparisons.labels != 0.5)
    is_a = decided.labels > 0.5
    preferred, other = np.where(is_a, decided.a, decided.b), np.where(is_a, decided.b, decided.a)
    features = torch.as_tensor(decided.features / scale, dtype=like.dtype, device=like.device)
    return features[torch.as_tensor(preferred)], features[torch.as_tensor(other)]
