"""If a batch does not fit on the GPU, measure and report how many of its prompts would fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from personalized_soups.errors import RunError

# The share of the memory that is kept free, because the allocator loses some memory and batches differ in shape.
_MARGIN = 0.05


@dataclass(frozen=True, slots=True)
class Room:
    """Functions that measure the memory of a device, in bytes.

    Attributes:
        total: returns the size of the device's memory.
        taken: returns the size of all tensors on the device.
        peak: returns the maximum size of all tensors since the last call of `forget_peak`.
        forget_peak: starts a new measurement of `peak`.
    """

    total: Callable[[], int]
    taken: Callable[[], int]
    peak: Callable[[], int]
    forget_peak: Callable[[], None]

    @classmethod
    def of(cls, device: torch.device) -> Room:
        """Return the functions for a CUDA device."""
        cuda = torch.cuda

        def forget() -> None:
            # torch keeps freed blocks, which would leave less room for the measurement.
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

    Enter this context before the mixture of the batch, because the measurement runs a batch of one row.

    Args:
        model: the causal language model that answers the batch.
        num_prompts: the number of prompts in the batch.
        width: a function that returns the number of tokens in a row, prompt and answer together. It is called only if
            the batch does not fit.
        rows_each: the number of rows in the batch for each prompt.

    Raises:
        RunError: if torch raises OutOfMemoryError. The message gives the largest batch that fits.
    """
    # `has_room` is set in the handler, but read only after it.
    has_room = True
    try:
        yield
    except torch.OutOfMemoryError:
        has_room = False
    if has_room:
        return
    # Within the handler, the error's frames would keep the batch's tensors alive.
    tokens = width()
    # The result must be smaller than the batch that did not fit, whatever the measurement says.
    fitting = min(num_prompts - 1, num_fitting(model, tokens, Room.of(model.device)) // rows_each)
    raise RunError(
        f"the GPU has no room for a batch of {num_prompts * rows_each} rows with up to {tokens} tokens each",
        where="batch_size",
        mend=f"use batch_size {fitting}"
        if fitting > 0
        else "use shorter prompts, fewer max_new_tokens, dtype='bfloat16' or another GPU: a single prompt does not fit",
    )


def num_fitting(model: Any, width: int, room: Room) -> int:
    """Return how many rows of `width` tokens fit on the device, from the memory that one row's forward pass takes.

    The forward pass computes all tokens at once, which takes more memory than generating them one by one. So the result
    is rather too small than too large.
    """
    room.forget_peak()
    before = room.taken()
    # The token ids do not matter, because the memory depends only on their number.
    ids = torch.zeros(1, width, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            # As in generation, logits are computed for the last token only: for all tokens they would take much memory.
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
    except torch.OutOfMemoryError:
        return 0
    row_bytes = max(1, room.peak() - before)
    return int((1 - _MARGIN) * (room.total() - before) // row_bytes)
