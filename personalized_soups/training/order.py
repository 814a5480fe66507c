"""The order in which pairs are seen: shuffled anew in each epoch, pairs of like length side by side.

Answers differ in length by a factor of five and more; in batches drawn blindly half of all tokens would be padding.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

# Lengths are sorted within this many batches: enough to save most padding, few enough that batches change with the
# epoch.
_BATCHES_SORTED = 16


class LikeLengthOrder(Sampler[int]):
    """Yields indices so that each run of `batch_size` of them has pairs of like length.

    The order depends on seed and epoch alone, so that a resumed training sees what an uninterrupted one does.
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
        # A batch that is not full must stay the last one, or all batches after it would be cut askew.
        last = [batches.pop()] if batches and len(batches[-1]) < self.batch_size else []
        rng.shuffle(batches)
        for batch in [*batches, *last]:
            yield from batch
