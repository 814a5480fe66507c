"""`VplModel`: the reward of a user from the user's comparisons, without training.

Shapes: N = comparisons, M = items, F = features of an item, Z = latent numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personalized_soups.systems.preference_models import Comparisons, Floats
from personalized_soups.systems.vpl.networks import Decoder, Encoder


@dataclass(frozen=True, slots=True, eq=False)
class VplReward:
    """The reward of the user with one latent vector.

    Attributes:
        decoder: the decoder of all users.
        z: [Z], the latent vector, on the decoder's device.
        scale: divides the features.
    """

    decoder: Decoder
    z: Tensor
    scale: float

    def rewards(self, features_MF: Floats) -> Floats:
        """Return [M], float64: the reward of each item."""
        features = torch.as_tensor(np.asarray(features_MF) / self.scale, dtype=self.z.dtype, device=self.z.device)
        with torch.no_grad():
            rewards = self.decoder(features, self.z.expand(len(features), -1))
        return np.asarray(rewards.cpu().numpy(), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class VplModel:
    """A trained encoder and decoder.

    Attributes:
        encoder: see `Encoder`.
        decoder: see `Decoder`.
        scale: divides the features.
        contexts: the comparisons of each known user, which stand for the user.
        losses: the loss of each training step.
    """

    encoder: Encoder
    decoder: Decoder
    scale: float
    contexts: Mapping[int, Comparisons]
    losses: tuple[float, ...]

    def known_user(self, user: int) -> VplReward:
        """Return the reward of a user of the training data."""
        return self.new_user(self.contexts[user])

    def new_user(self, comparisons: Comparisons) -> VplReward:
        """Return the reward of a new user: z is the mean of q(z | comparisons), without the rescaling of the training.

        Without comparisons, z is 0, the mean of the latent prior. A tie says nothing about the order of the two items,
        and is left out.
        """
        like = self.encoder.mean.bias
        pairs = torch.as_tensor(oriented_pairs(comparisons) / self.scale, dtype=like.dtype, device=like.device)
        if not len(pairs):
            return VplReward(self.decoder, torch.zeros_like(like), self.scale)
        with torch.no_grad():
            mean_1Z, _ = self.encoder(pairs[None])
        return VplReward(self.decoder, mean_1Z[0], self.scale)


def oriented_pairs(comparisons: Comparisons) -> Floats:
    """Return [N, 2 F]: the features of the preferred item, then those of the other item. Ties are left out."""
    decided = comparisons.at(comparisons.labels != 0.5)
    is_a = (decided.labels > 0.5)[:, None]
    a_NF, b_NF = decided.features[decided.a], decided.features[decided.b]
    return np.concatenate([np.where(is_a, a_NF, b_NF), np.where(is_a, b_NF, a_NF)], axis=1)
