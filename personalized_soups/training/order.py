"""Shuffle the pairs in each epoch, so that pairs of similar length share a batch.

Answers differ in length by a factor of five and more. In random batches, half of all tokens would be padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

# Pairs are sorted by length within groups of this many batches. Large groups save padding, and small groups let the
# batches differ between epochs.
_BATCHES_SORTED = 16


class LikeLengthOrder(Sampler[int]):
    """Yields indices of pairs. Each run of `batch_size` indices is a batch, with pairs of similar length.

    For given pairs, the order depends only on seed and epoch. So a resumed training gets the batches of an
    uninterrupted training.

    Args:
        lengths: the number of tokens of each pair.
        batch_size: the number of pairs in a batch.
        seed: random seed for the shuffling.
    """

    def __init__(self, lengths: Sequence[int], *, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = rng.sample(range(len(self.lengths)), len(self.lengths))
        stride = self.batch_size * _BATCHES_SORTED
        batches = []
        for start in range(0, len(order), stride):
            group = sorted(order[start : start + stride], key=self.lengths.__getitem__)
            batches += [group[first : first + self.batch_size] for first in range(0, len(group), self.batch_size)]
        # An incomplete batch must be the last batch. Otherwise the trainer would split all later batches wrongly.
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)
        for batch in [*batches, *last]:
            yield from batch
