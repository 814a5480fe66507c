"""A user whose texts a soup of known weights has written, and objectives that need no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.scoring.encoded_answers import EncodedAnswer
from tests.mixing.worlds import float64_model, random_ids

PROMPT_TOKENS, TEXT_TOKENS = 5, 24

Scores = npt.NDArray[np.float64]


def texts_of(
    base: Path, folders: Sequence[Path], weights: Mapping[str, float], count: int, *, seed: int = 0
) -> list[EncodedAnswer]:
    """Return texts that the float64 model of a soup samples at temperature 1; the package has no part in them."""
    model = float64_model(base, folders, [weights.get(folder.name, 0.0) for folder in folders])
    ids = random_ids(count, PROMPT_TOKENS, seed=seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for _ in range(TEXT_TOKENS):
            shares = model(input_ids=ids).logits[:, -1].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(shares, 1)], dim=1)
    return [EncodedAnswer(tuple(row), TEXT_TOKENS) for row in ids.tolist()]


class Noise:
    """Scores that have nothing to do with the weights, but are the same for the same weights, item and draw."""

    name = "noise"

    def __init__(self, num_items: int, *, seed: int = 0) -> None:
        self.num_items = num_items
        self.calls: list[tuple[int, int, int]] = []
        self._seed = seed

    def scores(self, candidates: Sequence[ExpertWeights], items: Sequence[int], *, draw: int) -> Scores:
        self.calls.append((len(candidates), len(items), draw))
        return np.array([[self.score(each, item, draw) for item in items] for each in candidates])

    def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
        key = repr((sorted(candidate.weights.items()), item, draw, self._seed)).encode()
        return int.from_bytes(hashlib.sha256(key).digest()[:6], "big") / 2**48


class Peak(Noise):
    """The closeness to known weights. `turned` items score the other way round."""

    name = "closeness"

    def __init__(self, num_items: int, target: Mapping[str, float], *, turned: Sequence[int] = ()) -> None:
        super().__init__(num_items)
        self._target = target
        self._turned = frozenset(turned)

    def score(self, candidate: ExpertWeights, item: int, draw: int) -> float:
        names = {*candidate.weights, *self._target}
        numbers = profile_weights(candidate)
        distance = sum((numbers.get(name, 0.0) - self._target.get(name, 0.0)) ** 2 for name in names)
        return distance if item in self._turned else -distance


def profile_weights(candidate: ExpertWeights) -> dict[str, float]:
    """Return weights that are the same in every layer."""
    numbers = {name: weight for name, weight in candidate.weights.items() if isinstance(weight, float)}
    assert numbers.keys() == candidate.weights.keys()
    return numbers
