"""`PolicyReward`: what RL maximises, a weighted sum of rewards of an answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.errors import DeclarationError, choose_from
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.reward_models import RewardModels
from personalized_soups.scoring.scorers import Scorer, scorer_of


@dataclass(frozen=True, slots=True)
class PolicyReward:
    """A weighted sum of rewards. A reward is a side's score of an answer, in [0, 1], or a reward model's output.

    Attributes:
        weights: the weight of each reward, by its name.
        scorers: the scorer of each side among the names, with the end that the side prefers.
        models: the reward models. Their names are the other names.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> reward = PolicyReward.of({"concise": 1.0}, catalogue)
        >>> reward.of_answers([TextItem("How do I clean a lamp?", "Dust it.")]).tolist()
        [1.0]
    """

    weights: Mapping[str, float]
    scorers: Mapping[str, tuple[Scorer, str]]
    models: RewardModels | None = None

    @classmethod
    def of(
        cls,
        weights: Mapping[str, float],
        catalogue: Catalogue,
        *,
        models: Mapping[str, Path | str] | None = None,
        scorers: Mapping[str, Scorer] | None = None,
        device: str = "auto",
    ) -> PolicyReward:
        """Return the reward with these weights.

        Args:
            weights: the weight of each reward. A name is that of a side of the catalogue, or one in `models`.
            catalogue: declares the sides and their scorers.
            models: the folder or hub id of a reward model for some names, which then need not be sides.
            scorers: functions that replace the catalogue's scorers, by the name of their side or dimension.
            device: where reward models compute.

        Raises:
            DeclarationError: if a name is neither a side nor in `models`, or a side has no scorer.
            InputError: if a reward model cannot be loaded.
            ValueError: if there are no weights.
        """
        if not weights:
            raise ValueError("a reward needs at least one weight")
        models = models or {}
        for name in weights:
            if name not in models and name not in catalogue.sides:
                raise DeclarationError(
                    f"the reward {name!r} is neither a side of the catalogue nor a reward model",
                    where=f"reward {name}",
                    mend=choose_from(name, {*catalogue.sides, *models}),
                )
        sides = [name for name in weights if name not in models]
        used = {name: models[name] for name in weights if name in models}
        return cls(
            weights=dict(weights),
            scorers={
                side: (scorer_of(catalogue, side, scorers=scorers), catalogue.side(side)[1].end) for side in sides
            },
            models=RewardModels(used, device=device) if used else None,
        )

    def of_answers(self, items: Sequence[TextItem]) -> npt.NDArray[np.float64]:
        """Return [N], float64: the reward of each answer.

        Raises:
            InputError: if an answer is too long for a reward model.
        """
        total = np.zeros(len(items))
        for side, (scorer, end) in self.scorers.items():
            scores = [scorer(item.prompt, item.answer).toward("low" if end == "low" else "high") for item in items]
            total += self.weights[side] * np.asarray(scores)
        if self.models is not None:
            weights = np.asarray([self.weights[name] for name in self.models.names])
            total += self.models.features(items) @ weights
        return total
