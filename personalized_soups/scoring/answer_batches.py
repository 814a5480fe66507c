"""Compute a row of figures for each answer, in batches of answers of similar length.

Shapes: N = items, W = figures of an item.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from personalized_soups.scoring.encoded_answers import EncodedAnswer

Floats = npt.NDArray[np.float64]
Item = TypeVar("Item", bound=Hashable)


def rows_of_answers(
    items: Sequence[Item],
    *,
    encode: Callable[[Item], EncodedAnswer],
    num_fitting: Callable[[Sequence[EncodedAnswer]], int],
    compute: Callable[[Sequence[EncodedAnswer]], Floats],
    width: int,
    on_done: Callable[[int], None] | None = None,
) -> Floats:
    """Return [N, W], float64: the figures of each item. An item that occurs several times is computed once.

    Args:
        items: the prompts with answers, as texts or as token ids.
        encode: returns the token ids of an item. All items are encoded first, so an invalid one costs no computation.
        num_fitting: returns how many of the given answers, the shortest first, fit in one batch. At least 1.
        compute: returns the figures of one batch.
        width: W.
        on_done: called after each batch with the number of different items that are finished.
    """
    unique = {item: encode(item) for item in items}
    # Answers of similar length share a batch, so that a batch has little padding.
    order = sorted(unique, key=lambda item: len(unique[item].ids))
    rows: dict[Item, Floats] = {}
    while len(rows) < len(order):
        # The last answer of a batch is the longest, but how many answers fit depends on it.
        rest = order[len(rows) :]
        num = num_fitting([unique[item] for item in rest])
        rows.update(zip(rest[:num], compute([unique[item] for item in rest[:num]]), strict=True))
        if on_done is not None:
            on_done(len(rows))
    return np.array([rows[item] for item in items], dtype=np.float64).reshape(len(items), width)
