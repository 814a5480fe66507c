"""Shuffle the examples in each epoch: pairs of similar length share a batch, and the answers to a prompt stay together.

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


class GroupOrder(Sampler[int]):
    """Yields indices of prompts for RL: each prompt of a batch as often as its group has answers.

    For given prompts, the order depends only on seed and epoch. So a resumed training gets the batches of an
    uninterrupted training. Prompts of an epoch's last, incomplete batch are left out.

    Args:
        num_prompts: the number of prompts.
        group_size: the number of answers to each prompt.
        prompts_per_batch: the number of prompts whose answers are sampled at once.
        repeats: how often each batch is yielded, because its answers serve several steps.
        seed: random seed for the shuffling.
    """

    def __init__(
        self, num_prompts: int, *, group_size: int, prompts_per_batch: int, repeats: int = 1, seed: int
    ) -> None:
        self.num_prompts = num_prompts
        self.group_size = group_size
        self.prompts_per_batch = prompts_per_batch
        self.repeats = repeats
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        whole = self.num_prompts // self.prompts_per_batch * self.prompts_per_batch
        return whole * self.group_size * self.repeats

    def __iter__(self) -> Iterator[int]:
        order = random.Random(f"{self.seed}/{self.epoch}").sample(range(self.num_prompts), self.num_prompts)
        for start in range(0, self.num_prompts - self.prompts_per_batch + 1, self.prompts_per_batch):
            for _ in range(self.repeats):
                for prompt in order[start : start + self.prompts_per_batch]:
                    yield from [prompt] * self.group_size
