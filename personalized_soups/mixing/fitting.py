"""Batches that do not fit on the GPU: how many prompts would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from personalized_soups.errors import RunError

# The share of the memory that stays free, for the allocator's losses and for batches of other shapes.
_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Room:
    """The memory of a device, in bytes.

    Attributes:
        total: returns the device's memory.
        taken: returns the memory of all tensors.
        peak: returns the most memory that tensors took since `forget_peak`.
        forget_peak: starts a new measurement of `peak`.
    """

    total: Callable[[], int]
    taken: Callable[[], int]
    peak: Callable[[], int]
    forget_peak: Callable[[], None]

    @classmethod
    def of(cls, device: torch.device) -> Room:
        """Return the memory of a CUDA device."""
        cuda = torch.cuda

        def forget() -> None:
            # Freed blocks that torch keeps would leave less room for the measurement.
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
    """If a batch within the block runs out of the GPU's memory, report how many of its prompts would fit.

    Enter the context before the batch's mixture, because the measurement runs a batch of one row.

    Args:
        model: the causal language model that answers the batch.
        num_prompts: of the batch.
        width: returns the tokens of a row, prompt and answer. Called only if the batch does not fit.
        rows_each: rows of the batch for each prompt.

    Raises:
        RunError: in place of CUDA's out-of-memory error, with the largest batch that fits.
    """
    # Set in the handler, and looked at after it.
    has_room = True
    try:
        yield
    except torch.OutOfMemoryError:
        has_room = False
    if has_room:
        return
    # Not in the handler: the error's frames keep the batch's tensors alive.
    tokens = width()
    # The batch did not fit, even if the measurement says so.
    fitting = min(num_prompts - 1, num_fitting(model, tokens, Room.of(model.device)) // rows_each)
    raise RunError(
        f"the GPU has no room for a batch of {num_prompts * rows_each} rows of up to {tokens} tokens",
        where="batch_size",
        mend=f"use batch_size {fitting}"
        if fitting > 0
        else "a single prompt does not fit: use shorter prompts, fewer max_new_tokens, a smaller dtype, or another GPU",
    )


def num_fitting(model: Any, width: int, room: Room) -> int:
    """Return how many rows of `width` tokens fit, by the memory of one row's forward pass and its cache.

    One pass over all tokens needs more memory than reading the prompt and generating token by token, so the number is
    safe.
    """
    room.forget_peak()
    before = room.taken()
    # Any token will do: memory depends on the number of tokens alone.
    ids = torch.zeros(1, width, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            # Logits of the last position alone, as in generation: those of a long prompt take much memory.
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return 0
    row_bytes = max(1, room.peak() - before)
    return int((1 - _MARGIN) * (room.total() - before) // row_bytes)
