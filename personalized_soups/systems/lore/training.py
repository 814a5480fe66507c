"""Learn LoRe's base rewards from the comparisons of many users.

Shapes: U = users, F = features of an item, J = base rewards, N = comparisons.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.systems.lore.model import LoreModel
from personalized_soups.systems.preference_models import Comparisons, Floats


@dataclass(frozen=True, slots=True)
class LoreSettings:
    """How LoRe learns. The defaults are those of the reference code.

    Attributes:
        rank: J, the number of base rewards before unused ones are dropped.
        steps: the number of steps of Adam, each over all comparisons.
        rate: the learning rate.
        temperature: divides the margins.
        reference_penalty: the weight of the mean of `1 - cosine(vector, reference)` over the base rewards, for a given
            reference reward. It rises from 0 at a fifth of the steps to its full value at four fifths. With it, the
            steps alternate between the users and the base rewards.
        least_weight: a base reward is dropped if no user gives it as much weight as this.
        seed: the random seed of the start.
    """

    rank: int = 5
    steps: int = 1000
    rate: float = 0.5
    temperature: float = 100.0
    reference_penalty: float = 1e4
    least_weight: float = 0.01
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank is {self.rank}, but must be at least 1")
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}, but must be greater than 0")


def train_lore(
    comparisons: Comparisons,
    settings: LoreSettings | None = None,
    *,
    reference: Floats | None = None,
    device: torch.device | str = "cpu",
) -> LoreModel:
    """Learn base rewards, and the convex combination of each of the users 0 to U-1, from their comparisons.

    The margin of user u is `(x_a - x_b) vectors softmax(logits_u) / temperature`. Without a reference, the loss is the
    sum over users of the mean negative log likelihood of the user's comparisons. With a reference, it is the mean over
    all comparisons plus the penalty. Features are scaled to differences of variance 1, so that their unit does not
    matter.

    Args:
        comparisons: the comparisons of at least one user.
        settings: the settings. The default is `LoreSettings()`.
        reference: [F], a reward that base rewards should resemble, such as the head of the reward model that gave the
            features.
        device: where the fit is computed, in float64. Random numbers are drawn on the CPU, so every device has the same
            start.

    Raises:
        UsageError: if there are no comparisons.

    Example:
        >>> items, tastes = np.eye(3), np.array([[1.0, 0.0, -1.0], [-1.0, 0.0, 1.0]])
        >>> a, b, users = np.array([0, 1, 0, 0, 1, 0]), np.array([1, 2, 2, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 1])
        >>> labels = tastes[users, a] > tastes[users, b]
        >>> model = train_lore(Comparisons(items, a, b, labels, users), LoreSettings(rank=2, steps=100))
        >>> int(np.argmax(model.known_user(1).rewards(items)))
        2
    """
    settings = settings or LoreSettings()
    if not len(comparisons):
        raise UsageError("there are no comparisons", where="comparisons", mend="give comparisons of several users")
    scale = comparisons.scale
    generator = torch.Generator().manual_seed(settings.seed)
    features = torch.tensor(comparisons.features / scale, device=device)
    a, b, users = (torch.tensor(each, device=device) for each in (comparisons.a, comparisons.b, comparisons.users))
    labels = torch.tensor(comparisons.labels, device=device)
    # a user counts once, however many comparisons the user made
    weights_N = 1 / torch.bincount(users).double()[users]
    target = None if reference is None else torch.tensor(reference, dtype=torch.float64, device=device)
    vectors, logits = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for shape in ((features.shape[1], settings.rank), (comparisons.num_users, settings.rank))
    )
    optimiser = torch.optim.Adam([vectors, logits], lr=settings.rate)
    losses = []
    for step in range(settings.steps):
        optimiser.zero_grad()
        base_MJ = features @ vectors / settings.temperature
        margins_N = ((base_MJ[a] - base_MJ[b]) * torch.softmax(logits, dim=1)[users]).sum(dim=1)
        loss_N = torch.nn.functional.binary_cross_entropy_with_logits(margins_N, labels, reduction="none")
        if target is None:
            loss = (weights_N * loss_N).sum()
        else:
            loss = loss_N.mean() + _ramp(step, settings) * _distance(vectors, target)
        loss.backward()
        if target is not None:  # Adam skips a parameter without a gradient
            (vectors if step % 2 == 0 else logits).grad = None
        optimiser.step()
        losses.append(float(loss.detach()))
    user_weights = torch.softmax(logits, dim=1).detach().cpu().numpy()
    return _without_unused(
        vectors.detach().cpu().numpy() / (scale * settings.temperature), user_weights, settings.least_weight, losses
    )


def _ramp(step: int, settings: LoreSettings) -> float:
    share = (step / settings.steps - 0.2) / 0.6
    return settings.reference_penalty * min(1.0, max(0.0, share))


def _distance(vectors_FJ: Tensor, reference_F: Tensor) -> Tensor:
    return (1 - torch.nn.functional.cosine_similarity(vectors_FJ, reference_F[:, None], dim=0)).mean()


def _without_unused(vectors: Floats, users: Floats, least_weight: float, losses: list[float]) -> LoreModel:
    """Return the model without the base rewards that no user gives `least_weight`. The other weights sum to 1 again."""
    used = users.max(axis=0) >= least_weight
    kept = users[:, used]
    return LoreModel(np.ascontiguousarray(vectors[:, used]), kept / kept.sum(axis=1, keepdims=True), tuple(losses))
