"""The encoder and the decoder of VPL.

Shapes: B = rows of a batch, C = comparisons of a user, F = features of an item, H = hidden units, Z = latent numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_SLOPE = 0.2  # of LeakyReLU
_BOUND = 1.0  # of the mean and of the log variance


class Encoder(nn.Module):
    """The normal distribution q(z | comparisons) of a user.

    Each comparison, the features of the preferred item followed by those of the other, passes a small network. Then one
    self-attention relates the comparisons, and their mean gives the mean and the log variance. There are no positions,
    so the order of the comparisons does not matter.
    """

    def __init__(self, num_features: int, num_hidden: int, num_latent: int) -> None:
        super().__init__()
        self.pair = _network(2 * num_features, num_hidden, num_latent)
        self.query, self.key, self.value = (nn.Linear(num_latent, num_latent) for _ in range(3))
        self.mean = nn.Linear(num_latent, num_latent)
        self.log_variance = nn.Linear(num_latent, num_latent)

    def forward(self, pairs_BCG: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and the log variance [B, Z], each cut to [-1, 1]. G is 2 F."""
        pairs_BCZ = self.pair(pairs_BCG)
        scores_BCC = self.query(pairs_BCZ) @ self.key(pairs_BCZ).transpose(1, 2) / math.sqrt(pairs_BCZ.shape[-1])
        whole_BZ = (torch.softmax(scores_BCC, dim=-1) @ self.value(pairs_BCZ)).mean(dim=1)
        return self.mean(whole_BZ).clamp(-_BOUND, _BOUND), self.log_variance(whole_BZ).clamp(-_BOUND, _BOUND)


class Decoder(nn.Module):
    """The reward of an item for a user with the latent vector z."""

    def __init__(self, num_features: int, num_hidden: int, num_latent: int) -> None:
        super().__init__()
        self.network = _network(num_features + num_latent, num_hidden, 1)

    def forward(self, features_BF: Tensor, z_BZ: Tensor) -> Tensor:
        """Return the rewards [B]."""
        rewards: Tensor = self.network(torch.cat([features_BF, z_BZ], dim=-1))[..., 0]
        return rewards


def _network(num_in: int, num_hidden: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_in, num_hidden),
        nn.LeakyReLU(_SLOPE),
        nn.Linear(num_hidden, num_hidden),
        nn.LeakyReLU(_SLOPE),
        nn.Linear(num_hidden, num_out),
    )
