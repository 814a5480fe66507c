"""Cache keys: the names under which a prompt's attention keys and values may be cached."""

from __future__ import annotations

import secrets
from collections.abc import Iterable
from itertools import count

import torch

from personalized_soups.declare.expert_weights import ExpertWeights

# All models of the process share one counter.
_STAMPS = count(1)


class CacheKeys:
    """Makes the cache keys of one model. A key changes with the weights, the experts' tensors, the dtype and the model.

    Each expert has a stamp: a number that is replaced whenever the expert's tensors or scale may have changed.
    """

    def __init__(self) -> None:
        # Two models with different bases may hold experts with equal names and stamps.
        self._model = secrets.token_hex(8)
        self._stamps: dict[str, int] = {}

    def of(self, weights: ExpertWeights, dtype: torch.dtype) -> str:
        """Return the cache key for keys and values that the model computes with these weights in this dtype."""
        return weights.cache_key(self._stamps, f"{self._model} {dtype}")

    def keep(self, names: Iterable[str]) -> None:
        """Drop the stamps of all experts except `names`. Experts in `names` that have no stamp get the stamp 0."""
        self._stamps = {name: self._stamps.get(name, 0) for name in names}

    def renew(self, names: Iterable[str]) -> None:
        """Give experts new stamps, so that cached keys and values that were computed with them are not used again."""
        for name in names:
            self._stamps[name] = next(_STAMPS)
