"""`PersonalModel`: what makes a model personal, as a small record. Other code knows nothing else of a system's user."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from personalized_soups.declare.expert_weights import ProfileLike
from personalized_soups.errors import UsageError

# Returns the reward of an answer to a prompt. An answer with a greater reward is better.
Reward: TypeAlias = Callable[[str, str], float]


@dataclass(frozen=True, slots=True)
class Plain:
    """The decoder that generates one answer."""


@dataclass(frozen=True, slots=True)
class BestOf:
    """The decoder that samples several answers and returns the one with the greatest reward.

    Among answers with equal rewards, the first one is returned.

    Attributes:
        num_answers: the number of answers to sample.
        reward: a function that returns the reward of an answer, given the prompt and the answer. The prompt is the last
            message of a chat, without the text of the personal model.

    Raises:
        UsageError: if `num_answers` is less than 1.
    """

    num_answers: int
    reward: Reward

    def __post_init__(self) -> None:
        if self.num_answers < 1:
            raise UsageError(
                f"num_answers is {self.num_answers}, but must be at least 1",
                where="num_answers",
                mend="give the number of answers to sample, such as num_answers=4",
            )


@dataclass(frozen=True, slots=True)
class MixLogProbs:
    """The decoder that draws each token from the weighted sum of the log-probabilities of several soups.

    Each soup computes every token, so an answer costs as much as one answer of each soup. The personal model's own
    profile is not used (multi-objective decoding, Shi et al. 2024, arXiv:2406.18853).

    Attributes:
        parts: the weight of each soup's log-probabilities, by its profile: a name, such as that of an expert, or None
            for the base.

    Raises:
        UsageError: if there are no parts, or a weight is not finite.
    """

    parts: Mapping[str | None, float]

    def __post_init__(self) -> None:
        if not self.parts or not all(map(math.isfinite, self.parts.values())):
            raise UsageError(
                f"the weights are {dict(self.parts)}, but there must be at least one, and all must be finite",
                where="parts",
                mend="give weights such as MixLogProbs({'concise': 0.5, 'friendly': 0.5})",
            )


@dataclass(frozen=True, slots=True, eq=False)
class PersonalModel:
    """What a system that learns about users knows of one user, in the form in which a model can use it.

    Every part is optional, and the parts combine: a soup, plus a private adapter, plus text before the prompt. Without
    any part, it is the base alone.

    Attributes:
        profile: the weights of experts that the SoupModel holds, as for `SoupModel.mixture`.
        adapter: the folder of a LoRA adapter that is added to the soup with weight 1.
        soft_tokens: a tensor [N, H], the vectors that come before the prompt. H is the width of the base's embeddings.
        text: a text that comes before the prompt, such as a description of the user or texts that were retrieved.
        decoder: how the answer is chosen: `Plain()`, `BestOf(...)` or `MixLogProbs(...)`.

    Example:
        >>> concise = PersonalModel(profile={"concise": 0.6}, text="I am in a hurry.")
        >>> concise.profile, concise.adapter
        ({'concise': 0.6}, None)
    """

    profile: ProfileLike = None
    adapter: Path | str | None = None
    soft_tokens: Tensor | None = None
    text: str = ""
    decoder: Plain | BestOf | MixLogProbs = Plain()

    @property
    def adapter_folder(self) -> Path | None:
        """The absolute path of the adapter's folder, or None."""
        return None if self.adapter is None else Path(self.adapter).resolve()
