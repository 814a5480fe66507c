"""Train PAL on the comparisons of many users.

Shapes: U = users, K = prototypes, F = features of an item.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from personalized_soups.errors import UsageError
from personalized_soups.systems.pal.model import PalModel, oriented
from personalized_soups.systems.pal.networks import PointPart, PromptPart
from personalized_soups.systems.preference_models import Comparisons


@dataclass(frozen=True, slots=True)
class PalSettings:
    """How PAL learns.

    Attributes:
        num_prototypes: K.
        num_prompt: the number of features, at the start of an item's features, that belong to the prompt. With 0, the
            model is PAL-A, whose prototypes are points. Otherwise, it is PAL-B, whose prototypes are functions of the
            prompt.
        steps: the number of training steps.
        batch_size: the number of comparisons in a step.
        network_rate: the learning rate of the networks.
        weight_decay: of the networks, as in AdamW.
        user_rate: the learning rate of PAL-A's prototypes and of the users' mixtures.
        scale_rate: the learning rate of PAL-B's scale.
        new_user_steps: the number of steps in the fit of a new user.
        new_user_rate: the learning rate of this fit.
        seed: the random seed.
    """

    num_prototypes: int = 2
    num_prompt: int = 0
    steps: int = 1200
    batch_size: int = 128
    network_rate: float = 3e-3
    weight_decay: float = 0.01
    user_rate: float = 0.03
    scale_rate: float = 0.1
    new_user_steps: int = 100
    new_user_rate: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_prototypes, self.steps, self.batch_size) < 1:
            raise ValueError("num_prototypes, steps and batch_size must be at least 1")
        if self.num_prompt < 0:
            raise ValueError(f"num_prompt is {self.num_prompt}, but must be at least 0")


def train_pal(
    comparisons: Comparisons, settings: PalSettings | None = None, *, device: torch.device | str = "cpu"
) -> PalModel:
    """Learn the shared part of PAL, and the mixture of prototypes of each of the users 0 to U-1. Ties are left out.

    Args:
        comparisons: the comparisons of the users.
        settings: the settings. The default is `PalSettings()`, for PAL-A.
        device: where the networks are computed, in float32. Random numbers are drawn on the CPU, so every device has
            the same start and sees the same batches.

    Raises:
        UsageError: if there are no comparisons without ties, or if no feature is left for the answer.
    """
    settings = settings or PalSettings()
    num_features = comparisons.features.shape[1]
    if settings.num_prompt >= num_features:
        raise UsageError(
            f"num_prompt is {settings.num_prompt}, but an item has {num_features} features, so none belongs to the "
            "answer",
            where="num_prompt",
            mend="put the features of the prompt first, then those of the answer",
        )
    users = torch.as_tensor(comparisons.users[comparisons.labels != 0.5])
    if not len(users):
        raise UsageError(
            "there are no comparisons without ties", where="comparisons", mend="give comparisons of several users"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        shared: PointPart | PromptPart = (
            PromptPart(num_features, settings.num_prompt, settings.num_prototypes)
            if settings.num_prompt
            else PointPart(num_features, settings.num_prototypes)
        )
        logits = torch.randn(comparisons.num_users, settings.num_prototypes)
    shared.to(device)
    logits = logits.to(device).requires_grad_()
    preferred, other = oriented(comparisons, comparisons.scale, like=logits)
    optimiser = torch.optim.AdamW(
        [
            {"params": list(shared.network.parameters()), "lr": settings.network_rate},
            *_own_groups(shared, settings),
            {"params": [logits], "lr": settings.user_rate, "weight_decay": 0.0},
        ],
        weight_decay=settings.weight_decay,
    )
    rng = np.random.default_rng(settings.seed)
    losses = []
    for _ in range(settings.steps):
        batch = torch.from_numpy(rng.integers(len(users), size=settings.batch_size))
        mixture = torch.softmax(logits[users[batch].to(device)], dim=-1)
        rows = batch.to(device)
        loss = shared.loss(shared.rewards(preferred[rows], mixture) - shared.rewards(other[rows], mixture))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    return PalModel(
        shared.requires_grad_(False),
        logits.detach(),
        comparisons.scale,
        settings.new_user_steps,
        settings.new_user_rate,
        tuple(losses),
    )


def _own_groups(shared: PointPart | PromptPart, settings: PalSettings) -> list[dict[str, object]]:
    if isinstance(shared, PointPart):
        return [{"params": [shared.prototypes], "lr": settings.user_rate, "weight_decay": 0.0}]
    return [
        {"params": list(shared.prototypes.parameters()), "lr": settings.network_rate},
        {"params": [shared.log_scale], "lr": settings.scale_rate, "weight_decay": 0.0},
    ]
