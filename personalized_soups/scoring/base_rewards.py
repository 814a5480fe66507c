"""`BaseRewards`: several reward functions of an item, whose weighted sum is the reward of a user.

The items are usually answers to prompts (`TextItem`). They may be anything that people compare, such as the statements
of a questionnaire.

Shapes: N = items, D = base rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Item_contra = TypeVar("Item_contra", contravariant=True)


class TextItem(NamedTuple):
    """An answer to a prompt.

    Example:
        >>> TextItem("How do I clean a lamp?", "Dust it.").answer
        'Dust it.'
    """

    prompt: str
    answer: str


class BaseRewards(Protocol[Item_contra]):
    """Reward functions that all users share. A user's reward is `w . features(item)`, for the user's weights `w` [D].

    Attributes:
        names: the name of each of the D rewards. Rewards of experts have the experts' names.
        digest: a hex digest that changes when the features of an item may change, for example with an expert's files.
    """

    @property
    def names(self) -> tuple[str, ...]:
        """The name of each reward."""
        ...

    @property
    def digest(self) -> str:
        """A hex digest of everything that the features depend on."""
        ...

    def features(self, items: Sequence[Item_contra], /) -> npt.NDArray[np.float64]:
        """Return [N, D], float64: each reward of each item."""
        ...
