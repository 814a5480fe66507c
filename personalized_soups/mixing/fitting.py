"""Batches that do not fit on the GPU: how many rows would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from personalized_soups.errors import RunError

# Left free of what is there: the allocator's own losses, and what a batch of another shape takes more.
_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a device, in bytes: what there is in all, what tensors take, and the most that they took."""

    total: Callable[[], int]
    taken: Callable[[], int]
    peak: Callable[[], int]
    forget_peak: Callable[[], None]

    @classmethod
    def of(cls, device: torch.device) -> Room:
        """Return a CUDA device's."""
        cuda = torch.cuda

        def forget() -> None:
            cuda.empty_cache()
            cuda.reset_peak_memory_stats(device)

        return cls(
            total=lambda: cuda.get_device_properties(device).total_memory,
            taken=lambda: cuda.memory_allocated(device),
            peak=lambda: cuda.max_memory_allocated(device),
            forget_peak=forget,
        )


@contextmanager
def fitting_rows(model: Any, num_prompts: int, width: Callable[[], int], *, rows_each: int = 1) -> Iterator[None]:
    """Tell, where a batch runs out of the GPU's memory, how many prompts of it would fit.

    To be entered before the batch's mixture: what is measured is a batch of one row.

    Args:
        model: a causal language model; within the block it answers the batch.
        num_prompts: of the batch.
        width: returns the tokens of a row in the end; asked only where the batch does not fit.
        rows_each: rows of the batch for each of them.

    Raises:
        RunError: in place of CUDA's out-of-memory error; it names the largest batch that fits by measure.
    """
    has_room = True
    try:
        yield
    except torch.OutOfMemoryError:
        has_room = False
    if has_room:
        return
    # outside of the handler: the batch's tensors are let go with the error's frames
    tokens = width()
    fitting = min(num_prompts - 1, num_fitting(model, tokens, Room.of(model.device)) // rows_each)
    raise RunError(
        f"the GPU has no room for a batch of {num_prompts * rows_each} rows of up to {tokens} tokens",
        where="batch_size",
        mend=f"take batch_size {fitting}"
        if fitting > 0
        else "take shorter prompts, fewer max_new_tokens, a smaller dtype, or another GPU: one prompt does not fit",
    )


def num_fitting(model: Any, width: int, room: Room) -> int:
    """Return how many rows of `width` tokens fit: by the memory that one of them takes in a forward, cache included.

    A forward over all of its tokens at once takes more than reading the prompt and answering token by token.
    """
    room.forget_peak()
    before = room.taken()
    ids = torch.zeros(1, width, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return 0
    each = max(1, room.peak() - before)
    return int((1 - _MARGIN) * (room.total() - before) // each)
