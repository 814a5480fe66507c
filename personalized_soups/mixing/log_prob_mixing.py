"""Draw one token for several rows of a batch from the weighted sum of their log-probabilities.

The rows of a group have the same prompt, and each has its own model. They get the same token at every step, which is
drawn from `softmax(sum_i w_i log p_i)`: multi-objective decoding (Shi et al. 2024, arXiv:2406.18853).

Shapes: B = rows of the batch, E = rows of a group, G = groups, V = vocabulary size.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor

from personalized_soups.errors import UsageError


class MixedLogProbs:
    """A logits processor that gives all rows of a group the weighted sum of the rows' log-probabilities.

    Args:
        weights_B: the weight of each row's log-probabilities, float.
        group_size: E, the number of consecutive rows of a group.
    """

    def __init__(self, weights_B: Tensor, group_size: int) -> None:
        self._weights_B = weights_B
        self._group_size = group_size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return new scores (B, V), float32. The rows of a group are equal."""
        weighted_BV = torch.log_softmax(scores.float(), dim=-1) * self._weights_B[:, None]
        # A row of weight 0 plays no part, also where it excludes a token: 0 times minus infinity is no number.
        weighted_BV = weighted_BV.masked_fill((self._weights_B == 0)[:, None], 0.0)
        num_groups = len(weighted_BV) // self._group_size
        sums_GV = weighted_BV.reshape(num_groups, self._group_size, -1).sum(dim=1)
        return sums_GV.repeat_interleave(self._group_size, dim=0)


def group_size_of(places: Sequence[int] | None, weights: Sequence[float], num_rows: int) -> int:
    """Return the number of consecutive rows with equal places, which form a group.

    Raises:
        UsageError: if there are no places, the groups differ in size, or there is not one weight for each row.
    """
    if len(weights) != num_rows:
        raise UsageError(
            f"log_prob_weights has {len(weights)} entries, but the number of prompts is {num_rows}",
            where="log_prob_weights",
            mend="give one weight for each prompt",
        )
    sizes = {len(list(rows)) for _, rows in groupby(places or ())}
    if len(sizes) != 1:
        raise UsageError(
            f"groups of prompts with equal places have the sizes {sorted(sizes)}, but all must have the same size",
            where="places",
            mend="give the rows of a group the same place, each group its own, and all groups the same number of rows",
        )
    return sizes.pop()
