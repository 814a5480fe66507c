"""`RewardJudge`: reward models of the sides as held-out judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.reward_models import RewardModels

Floats = npt.NDArray[np.float64]


class RewardJudge:
    """Judges by one reward model for each side.

    A reward of Bradley and Terry is known up to a constant. So rewards are relative to the mean reward of a reference,
    the answers of the base. The score towards a side is p / (p + q): p is the exponential of the side's relative
    reward, and q the mean of those of the dimension's other sides. For two sides, it is the probability of Bradley and
    Terry. The reference has scores around 0.5.

    Args:
        catalogue: the sides.
        models: the reward models, one with the name of each side.
        reference: the mean reward of the reference for each model. By default 0.
    """

    def __init__(self, catalogue: Catalogue, models: RewardModels, reference: Floats | None = None) -> None:
        self._catalogue = catalogue
        self._models = models
        self._reference_S = np.zeros(len(models.names)) if reference is None else reference

    def centred_on(self, prompts: Sequence[str], answers: Sequence[str]) -> Self:
        """Return the judge whose reference are these answers."""
        return type(self)(self._catalogue, self._models, self._rewards(prompts, answers).mean(axis=0))

    def toward(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Mapping[str, float]]:
        """Return the score of each answer towards each side.

        Raises:
            InputError: if an answer is too long for a reward model.
        """
        rewards_NS = self._rewards(prompts, answers) - self._reference_S
        by_side = dict(zip(self._models.names, rewards_NS.T, strict=True))
        scores: dict[str, Floats] = {}
        for dimension in self._catalogue.dimensions.values():
            rewards = [by_side[side] for side in dimension.sides]
            # A dimension with one side is compared with the reference itself.
            if len(rewards) == 1:
                rewards.append(np.zeros_like(rewards[0]))
            exponents = np.exp(np.stack(rewards) - np.max(rewards, axis=0))
            others = (exponents.sum(axis=0) - exponents) / (len(rewards) - 1)
            scores |= dict(zip(dimension.sides, exponents / (exponents + others), strict=False))
        return [{side: float(values[at]) for side, values in scores.items()} for at in range(len(answers))]

    def _rewards(self, prompts: Sequence[str], answers: Sequence[str]) -> Floats:
        return self._models.features([TextItem(*both) for both in zip(prompts, answers, strict=True)])
