"""The shared parts of PAL-A and PAL-B.

Shapes: B = rows of a batch, F = features of an item, P = features of a prompt, K = prototypes.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

# the logit scale of PAL-B starts at log(1 / 0.07) and its exponential is at most 100, as in CLIP
_FIRST_SCALE = math.log(1 / 0.07)
_LARGEST_SCALE = 100.0


class SharedPart(Protocol):
    """The part of PAL that all users share."""

    def rewards(self, features_BF: Tensor, mixture_BK: Tensor) -> Tensor:
        """Return the rewards [B] of items for users with these mixtures of the prototypes."""
        ...

    def loss(self, margins_B: Tensor) -> Tensor:
        """Return the mean loss of the rewards of preferred items minus those of the others."""
        ...


class PointPart(nn.Module):
    """PAL-A: prototypes are points. The reward of an item is minus its distance to the user's ideal point.

    With the network f, the ideal point is `f(mixture prototypes)` and the item's point is `f(features)`. The loss is
    the hinge with margin 1.
    """

    def __init__(self, num_features: int, num_prototypes: int) -> None:
        super().__init__()
        points = torch.randn(num_prototypes, num_features)
        self.prototypes = nn.Parameter(points / points.norm(dim=1, keepdim=True))
        self.network = Residual(num_features)

    def rewards(self, features_BF: Tensor, mixture_BK: Tensor) -> Tensor:
        """Return the rewards [B]."""
        ideal_BF = self.network(mixture_BK @ self.prototypes)
        # the norm has no derivative at 0
        squared_B: Tensor = (self.network(features_BF) - ideal_BF).square().sum(dim=-1)
        return -squared_B.clamp(min=1e-12).sqrt()

    def loss(self, margins_B: Tensor) -> Tensor:
        """Return the mean of `max(0, 1 - margin)`."""
        return torch.relu(1 - margins_B).mean()


class PromptPart(nn.Module):
    """PAL-B: prototypes are functions of the prompt. The reward is the cosine of answer and ideal point, times a scale.

    The first `num_prompt` features of an item belong to the prompt, the others to the answer. The loss is the cross
    entropy.
    """

    def __init__(self, num_features: int, num_prompt: int, num_prototypes: int) -> None:
        super().__init__()
        self.num_prompt = num_prompt
        num_answer = num_features - num_prompt
        self.prototypes = nn.ModuleList([_network(num_prompt, num_answer) for _ in range(num_prototypes)])
        self.network = _network(num_answer, num_answer)
        self.log_scale = nn.Parameter(torch.tensor(_FIRST_SCALE))

    def rewards(self, features_BF: Tensor, mixture_BK: Tensor) -> Tensor:
        """Return the rewards [B]."""
        prompt_BP, answer_BA = features_BF[:, : self.num_prompt], features_BF[:, self.num_prompt :]
        prototypes_BKA = torch.stack([prototype(prompt_BP) for prototype in self.prototypes], dim=1)
        ideal_BA = (mixture_BK[:, :, None] * prototypes_BKA).sum(dim=1)
        cosine_B = torch.nn.functional.cosine_similarity(self.network(answer_BA), ideal_BA, dim=-1)
        return self.log_scale.exp().clamp(max=_LARGEST_SCALE) * cosine_B

    def loss(self, margins_B: Tensor) -> Tensor:
        """Return the mean of `-log sigmoid(margin)`."""
        return torch.nn.functional.softplus(-margins_B).mean()


class Residual(nn.Module):
    """A network with two hidden layers of the width of its input, ReLU, and a residual connection around each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(2)])
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of `x`."""
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        result: Tensor = self.out(x)
        return result


def _network(num_in: int, num_out: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(num_in, num_out), nn.GELU(), nn.Linear(num_out, num_out), nn.GELU(), nn.Linear(num_out, num_out)
    )
