"""Train VPL on the comparisons of many users.

Shapes: B = rows of a batch, C = comparisons of a context, G = 2 F numbers of a comparison, Z = latent numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.systems.preference_models import Comparisons, Indices
from personalized_soups.systems.vpl.model import VplModel, oriented_pairs
from personalized_soups.systems.vpl.networks import Decoder, Encoder


@dataclass(frozen=True, slots=True)
class VplSettings:
    """How VPL learns.

    Attributes:
        num_latent: Z, the width of a user's latent vector.
        num_hidden: the hidden units of the networks.
        num_context: C, the number of a user's comparisons that the encoder reads in training.
        divergence_weight: the weight of the KL divergence from the standard normal distribution.
        ramp_steps: the factor of this weight rises from 0.1 to 1 over so many steps, along a cosine, and starts again.
        steps: the number of training steps.
        batch_size: the number of comparisons in a step, each with a context of the same user.
        rate: the learning rate of AdamW, which falls along a cosine after a warm-up of 3% of the steps.
        weight_decay: of AdamW.
        seed: the random seed.
    """

    num_latent: int = 8
    num_hidden: int = 32
    num_context: int = 8
    divergence_weight: float = 1e-4
    ramp_steps: int = 10_000
    steps: int = 800
    batch_size: int = 256
    rate: float = 3e-3
    weight_decay: float = 0.001
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.num_latent, self.num_hidden, self.num_context, self.steps, self.batch_size, self.ramp_steps) < 1:
            raise ValueError("every number of VplSettings must be at least 1")


def train_vpl(
    comparisons: Comparisons, settings: VplSettings | None = None, *, device: torch.device | str = "cpu"
) -> VplModel:
    """Train an encoder of users' comparisons and a decoder of rewards. Ties are left out.

    In each step, a batch of comparisons is drawn, each with a context: other comparisons of the same user, drawn
    without replacement where the user has enough of them. With the reparametrised z, rescaled to the norm sqrt(Z), the
    loss is the mean of `-log sigmoid(r(preferred, z) - r(other, z))` plus the weighted KL divergence.

    Args:
        comparisons: the comparisons of the users.
        settings: the settings. The default is `VplSettings()`.
        device: where the networks are computed, in float32. Random numbers are drawn on the CPU, so every device sees
            the same batches.

    Raises:
        UsageError: if a user has fewer than two decided comparisons.
    """
    settings = settings or VplSettings()
    contexts = {int(user): comparisons.of_user(int(user)) for user in np.unique(comparisons.users)}
    scale = comparisons.scale
    pairs = [torch.tensor(oriented_pairs(mine) / scale, dtype=torch.float32) for mine in contexts.values()]
    _check(contexts, pairs)
    pairs_NG, sizes_U = torch.cat(pairs), np.array([len(each) for each in pairs])
    rng = np.random.default_rng(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        num_features = comparisons.features.shape[1]
        encoder = Encoder(num_features, settings.num_hidden, settings.num_latent)
        decoder = Decoder(num_features, settings.num_hidden, settings.num_latent)
    noise = torch.Generator().manual_seed(settings.seed)
    networks = torch.nn.ModuleList([encoder, decoder]).to(device)
    optimiser = torch.optim.AdamW(networks.parameters(), lr=settings.rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: rate_factor(step, settings.steps))
    losses = []
    for step in range(settings.steps):
        context_BCG, target_BG = _batch(pairs_NG, sizes_U, settings, rng)
        epsilon_BZ = torch.randn((settings.batch_size, settings.num_latent), generator=noise).to(device)
        mean_BZ, log_variance_BZ = encoder(context_BCG.to(device))
        z_BZ = rescaled(mean_BZ + torch.exp(log_variance_BZ / 2) * epsilon_BZ)
        preferred_BF, other_BF = target_BG.to(device).chunk(2, dim=1)
        margins_B = decoder(preferred_BF, z_BZ) - decoder(other_BF, z_BZ)
        weight = settings.divergence_weight * divergence_factor(step, settings.ramp_steps)
        loss = torch.nn.functional.softplus(-margins_B).mean() + weight * divergence(mean_BZ, log_variance_BZ).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return VplModel(encoder.eval(), decoder.eval(), scale, contexts, tuple(losses))


def rescaled(z_BZ: Tensor) -> Tensor:
    """Return latent vectors with the norm sqrt(Z), which is about the norm of a draw from the prior."""
    norm: Tensor = z_BZ.norm(dim=-1, keepdim=True).clamp(min=torch.finfo(z_BZ.dtype).tiny)
    return z_BZ / norm * math.sqrt(z_BZ.shape[-1])


def divergence(mean_BZ: Tensor, log_variance_BZ: Tensor) -> Tensor:
    """Return [B]: the KL divergence of normal distributions from the standard normal distribution."""
    return 0.5 * (log_variance_BZ.exp() + mean_BZ.square() - 1 - log_variance_BZ).sum(dim=-1)


def divergence_factor(step: int, ramp_steps: int) -> float:
    """Return the factor of the divergence's weight at a step, from 0.1 to 1."""
    share = (step % ramp_steps) / ramp_steps
    return 0.1 + 0.9 * (1 - math.cos(math.pi * share)) / 2


def rate_factor(step: int, steps: int) -> float:
    """Return the factor of the learning rate at a step: a linear warm-up over 3% of the steps, then half a cosine."""
    warm_up = max(1, round(0.03 * steps))
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def _batch(
    pairs_NG: Tensor, sizes_U: Indices, settings: VplSettings, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Return contexts [B, C, G] and one further comparison [B, G] of the same users. Each comparison is equally likely.

    The rows of `pairs_NG` are sorted by user. A user with too few comparisons gets a context with repeated ones, but
    never the comparison to predict.
    """
    starts_U = np.cumsum(sizes_U) - sizes_U
    target_B = rng.integers(len(pairs_NG), size=settings.batch_size)
    user_B = np.searchsorted(starts_U, target_B, side="right") - 1
    own_B = target_B - starts_U[user_B]
    others_BC = distinct(sizes_U[user_B] - 1, settings.num_context, rng)
    context_BC = starts_U[user_B][:, None] + others_BC + (others_BC >= own_B[:, None])
    return pairs_NG[torch.from_numpy(context_BC)], pairs_NG[torch.from_numpy(target_B)]


def distinct(sizes_B: Indices, count: int, rng: np.random.Generator) -> Indices:
    """Return [B, count]: in each row, different numbers from 0 to the row's size - 1, all subsets equally likely.

    A row whose size is less than `count` gets numbers that may be equal. The i-th number is drawn from those that are
    left, and then skips the numbers that are taken, in ascending order.
    """
    taken = np.empty((len(sizes_B), 0), dtype=np.int64)
    enough_B = sizes_B >= count
    for drawn in range(count):
        number_B = rng.integers(np.where(enough_B, sizes_B - drawn, sizes_B))
        for column in range(drawn):
            number_B = number_B + (enough_B & (number_B >= taken[:, column]))
        taken = np.sort(np.column_stack([taken, number_B]), axis=1)
    return taken


def _check(contexts: dict[int, Comparisons], pairs: Sequence[Tensor]) -> None:
    if not pairs:
        raise UsageError("there are no comparisons", where="comparisons", mend="give comparisons of several users")
    few = [user for user, each in zip(contexts, pairs, strict=True) if len(each) < 2]
    if few:
        raise UsageError(
            f"user {few[0]} has fewer than two comparisons that are no ties, so none can be predicted from another",
            where="comparisons",
            mend="leave out users with fewer than two decided comparisons",
        )
