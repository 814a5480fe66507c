"""Keys under which the keys and values of prompts may be cached."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from itertools import count

import torch

from personalized_soups.declare.expert_weights import ExpertWeights

# One counter for all models of the process.
_STAMPS = count(1)


class CacheKeys:
    """The cache keys of one model. A key changes with the weights, the experts' tensors, the dtype and the model.

    Each expert has a stamp, a number that is new whenever its tensors or its scale may have changed.
    """

    def __init__(self) -> None:
        # Two models may hold experts of equal names and stamps on different bases.
        self._model = secrets.token_hex(8)
        self._stamps: dict[str, int] = {}

    def of(self, weights: ExpertWeights, dtype: torch.dtype) -> str:
        """Return the key of a prompt that is read with these weights, in a model of this dtype."""
        return weights.cache_key(self._stamps, f"{self._model} {dtype}")

    def keep(self, names: Iterable[str]) -> None:
        """Keep the stamps of these experts alone; experts without a stamp get 0."""
        self._stamps = {name: self._stamps.get(name, 0) for name in names}

    def renew(self, names: Iterable[str]) -> None:
        """Give experts new stamps, so that keys and values that were computed with them are not found again."""
        for name in names:
            self._stamps[name] = next(_STAMPS)
