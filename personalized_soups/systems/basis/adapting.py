"""Train a LoRA adapter of the base together with the base rewards, as PReF trains its language model.

Shapes: F = features of an answer, J = base rewards, B = comparisons of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.scoring.hidden_states import HiddenStates
from personalized_soups.systems.basis.data import TextComparisons
from personalized_soups.systems.pref.model import PrefModel
from personalized_soups.systems.pref.training import PrefSettings, train_pref


@dataclass(frozen=True, slots=True)
class AdaptSettings:
    """How the adapter is trained.

    Attributes:
        epochs: how often each comparison is used.
        batch_size: the number of comparisons in a step.
        adapter_rate: the learning rate of the adapter.
        rate: the learning rate of the base rewards and the users' weights.
        seed: the random seed of the order of the comparisons.
    """

    epochs: int = 1
    batch_size: int = 32
    adapter_rate: float = 1e-4
    rate: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.batch_size) < 1:
            raise ValueError("epochs and batch_size must be at least 1")


def train_adapted(
    data: TextComparisons,
    states: HiddenStates,
    settings: PrefSettings | None = None,
    adapting: AdaptSettings | None = None,
) -> PrefModel:
    """Train the adapter of the model in `states`, and return the base rewards on the adapted hidden states.

    The base rewards are first learned on the frozen hidden states. Then Adam trains the adapter, the base rewards and
    the users' weights on batches of comparisons, with the penalties of `settings`. Finally, the base rewards and the
    users' weights are learned again on the hidden states of the trained adapter, over all comparisons. Only parameters
    of the model that require gradients are changed: with PEFT, these are the adapter's.

    Args:
        data: the comparisons of at least two users.
        states: the hidden states of a PEFT model. Their digest covers the adapter. Save the adapter with PEFT's
            `save_pretrained`.
        settings: how the base rewards are learned, without a fixed first one.
        adapting: how the adapter is trained.

    Raises:
        UsageError: if no parameter of the model can be trained, or as `train_pref` does.
    """
    settings, adapting = settings or PrefSettings(), adapting or AdaptSettings()
    trained = [parameter for parameter in states.model.parameters() if parameter.requires_grad]
    if not trained or settings.fixed_first:
        raise UsageError(
            "the model has no parameter that requires gradients" if not trained else "fixed_first is not supported",
            where="states" if not trained else "settings",
            mend="give a model with an adapter, from peft.get_peft_model" if not trained else "give fixed_first=False",
        )
    frozen = data.comparisons(states)
    start = train_pref(frozen, settings, device=states.device)
    scale = frozen.scale
    vectors, users = (
        torch.tensor(array, dtype=torch.float32, device=states.device).requires_grad_()
        for array in (start.vectors * scale, start.users)
    )
    optimiser = torch.optim.Adam(
        [{"params": trained, "lr": adapting.adapter_rate}, {"params": [vectors, users], "lr": adapting.rate}]
    )
    encoded = [states.encode(item) for item in data.items]
    a, b, numbers = (np.asarray(each, dtype=np.int64) for each in (data.a, data.b, data.users))
    labels = torch.tensor(data.labels, dtype=torch.float32, device=states.device)
    rng = np.random.default_rng(adapting.seed)
    for _ in range(adapting.epochs):
        order = rng.permutation(len(labels))
        for begin in range(0, len(order), adapting.batch_size):
            batch = order[begin : begin + adapting.batch_size]
            # an answer that several comparisons of the batch share is computed once
            needed, places = np.unique(np.concatenate([a[batch], b[batch]]), return_inverse=True)
            base_MJ = states.pooled([encoded[item] for item in needed]) / scale @ vectors
            first, second = base_MJ[torch.from_numpy(places).to(base_MJ.device)].chunk(2)
            margins_B = ((first - second) * users[torch.from_numpy(numbers[batch]).to(users.device)]).sum(dim=1)
            index = torch.from_numpy(batch).to(labels.device)
            loss: Tensor = torch.nn.functional.binary_cross_entropy_with_logits(margins_B, labels[index])
            penalty = settings.users_penalty * users.square().sum() + settings.vectors_penalty * vectors.square().sum()
            optimiser.zero_grad()
            (loss + penalty / (2 * len(labels))).backward()
            optimiser.step()
    return train_pref(data.comparisons(states), settings, device=states.device)
