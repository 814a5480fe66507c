"""Where a study's prompts come from: a file of prompts, or the world of the embedded base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from personalized_soups.declare.prompt_set import Split
from personalized_soups.tiny import corpus


class PromptSource(Protocol):
    """Draws prompts for training, validation and test. `PromptSet` is such a source."""

    def draw(self, split: Split, count: int, seed: int) -> Sequence[str]:
        """Return `count` prompts of one split. No subject is in two splits."""
        ...


_TINY_SPLITS: Mapping[Split, corpus.Split] = {"train": "seen", "validation": "validation", "test": "held-out"}


@dataclass(frozen=True, slots=True)
class TinyPrompts:
    """Questions of the embedded base's world. The test split has objects that the base has never seen."""

    def draw(self, split: Split, count: int, seed: int) -> Sequence[str]:
        """Return `count` questions on distinct topics, balanced over actions.

        Raises:
            ValueError: if the split has fewer topics.
        """
        return corpus.prompts(_TINY_SPLITS[split], count, seed)
