"""Which entries of a delta are kept, and by how much they grow: by magnitude, at random, or by both.

Each rule is a `Keep`: it takes a block of rows in float32 or float64, and the flat index of its first element, and
returns the block with the other entries 0. It changes nothing, and may return the block itself where all is kept.

O out features, I in features, N rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from personalized_soups.methods.blocks import row_blocks, widened
from personalized_soups.methods.streams import Stream

Keep = Callable[[Tensor, int], Tensor]

# A magnitude is its bit pattern without the sign, which sorts as the float does. It is found digit by digit, 16 bits
# at a time: counting into 2^16 bins runs at twice the rate of a partition and six times that of kthvalue.
_DIGIT = 16


def trim(threshold: float) -> Keep:
    """Keep every entry of at least this magnitude: 0 keeps all, infinity none."""
    if threshold == 0:
        return lambda block_NI, _start: block_NI

    def keep(block_NI: Tensor, _start: int) -> Tensor:
        # hardshrink drops what is not above its bound, so the bound is the next float below; one pass, no mask
        bound = torch.nextafter(torch.tensor(threshold, dtype=block_NI.dtype), torch.zeros((), dtype=block_NI.dtype))
        return torch.hardshrink(block_NI, float(bound))

    return keep


def drop(density: float, stream: Stream) -> Keep:
    """Keep entries at random, each with probability `density`, as they are; element i is decided by word i."""
    if density >= 1:
        return lambda block_NI, _start: block_NI
    highest = _highest_word(torch.tensor(density, dtype=torch.float64))

    def keep(block_NI: Tensor, start: int) -> Tensor:
        words = stream.words(block_NI.numel(), block_NI.device, start=start).view(block_NI.shape)
        return block_NI * (words <= int(highest))

    return keep


def drop_small(density: float, epsilon: float, stream: Stream, *, rescales: bool) -> Keep:
    """Keep entries at random, larger ones of a row more often (MAGPRUNE, arXiv 2406.11617).

    A row's entry of rank j among I by magnitude, counted from 0, has the probability
    `p = density - epsilon + 2 epsilon j / (I - 1)`; of equal magnitudes the earlier has the lower rank; a row of one
    entry has `density`. `rescales` divides what is kept by p.

    Raises:
        ValueError: if a probability is not above 0, or above 1.
    """
    if density - epsilon <= 0 or density + epsilon > 1:
        raise ValueError(f"the keep-probabilities {density:g} -+ {epsilon:g} leave the range above 0 and at most 1")
    if density >= 1 and epsilon == 0:
        return lambda block_NI, _start: block_NI

    def keep(block_NI: Tensor, start: int) -> Tensor:
        width = block_NI.shape[1]
        device = block_NI.device
        spread = epsilon if width > 1 else 0.0
        p_I = torch.linspace(density - spread, density + spread, width, dtype=torch.float64).clamp_(max=1.0)
        order_NI = _ascending(block_NI)
        highest_NI = torch.empty(block_NI.shape, dtype=torch.int32, device=device)
        highest_NI.scatter_(1, order_NI, _highest_word(p_I).to(device).expand(block_NI.shape))
        words = stream.words(block_NI.numel(), device, start=start).view(block_NI.shape)
        kept_NI = block_NI * (words <= highest_NI)
        if rescales:
            divisor_NI = torch.empty_like(block_NI)
            kept_NI /= divisor_NI.scatter_(1, order_NI, p_I.to(device, block_NI.dtype).expand(block_NI.shape))
        return kept_NI

    return keep


def scaled(keep: Keep, divisor: float) -> Keep:
    """Divide by a number what `keep` leaves."""
    return keep if divisor == 1 else lambda block_NI, start: keep(block_NI, start).div(divisor)


def matched(keep: Keep, delta_OI: Tensor) -> Keep:
    """Scale what `keep` leaves to the L1 norm of the whole delta, as mergekit's `rescale_norm` does.

    Nothing is scaled where one of the two norms is below 1e-7 (mergekit's guard).
    """
    before = _l1_norm(delta_OI, lambda block_NI, _start: block_NI)
    after = _l1_norm(delta_OI, keep)
    return keep if min(before, after) < 1e-7 else scaled(keep, after / before)


def num_kept(density: float, count: int, at_least: int = 0) -> int:
    """Return how many of `count` entries a density keeps: rounded down, as PEFT and mergekit do."""
    return min(count, max(at_least, int(density * count)))


def threshold(delta_OI: Tensor, density: float, *, at_least: int = 0) -> float:
    """Return the magnitude of the entry that is k-th largest, `k = num_kept(density, O * I, at_least)`; see `trim`."""
    return global_threshold(lambda: (delta_OI,), density, at_least=at_least)


def global_threshold(deltas: Callable[[], Iterable[Tensor]], density: float, *, at_least: int = 0) -> float:
    """Return the magnitude of the k-th largest entry of all deltas together, exactly: a radix select.

    Args:
        deltas: gives the same matrices each time it is called: one after another, twice (four times for float64). No
            more than one of them is needed at once. 16-bit floats count as float32.
        density: k is `int(density * count)`.
        at_least: the least k.

    Returns:
        The magnitude; 0, which keeps all, where `density` is 1 or there is no entry; infinity where k is 0.
    """
    first = next(iter(deltas()), None)
    if density >= 1 or first is None:
        return 0.0
    dtype = widened(first[:0]).dtype
    left = dtype.itemsize * 8 - 1
    prefix, remaining = None, 0
    while left:
        width = min(_DIGIT, left)
        left -= width
        counts = _digit_counts(deltas(), prefix, left, width)
        if prefix is None:
            total = int(counts.sum())
            remaining = num_kept(density, total, at_least)
            if remaining == 0:
                return math.inf if total else 0.0
        from_above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, remaining))
        remaining -= int(from_above[place - 1]) if place else 0
        prefix = (prefix or 0) << width | (2**width - 1 - place)
    words = torch.int32 if dtype == torch.float32 else torch.int64
    return float(torch.tensor(prefix, dtype=words).view(dtype))


def _digit_counts(deltas: Iterable[Tensor], prefix: int | None, shift: int, width: int) -> Tensor:
    """Count the magnitudes' digits, `width` bits wide and `shift` from the end, where those above are `prefix`."""
    counts = torch.zeros(2**width, dtype=torch.int64)
    for words in _magnitudes(deltas):
        if prefix is not None:
            words = words[words >> (shift + width) == prefix] & (2 ** (shift + width) - 1)  # noqa: PLW2901
        counts += torch.bincount(words >> shift, minlength=2**width).cpu()
    return counts


def _magnitudes(deltas: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the magnitudes' bit patterns by the block, as new tensors of one dimension."""
    for delta_OI in deltas:
        for rows in row_blocks(delta_OI):
            block = widened(delta_OI[rows]).abs().flatten()
            yield block.view(torch.int32 if block.dtype == torch.float32 else torch.int64)


def _ascending(block_NI: Tensor) -> Tensor:
    """Return each row's columns by rising magnitude, of equal ones the earlier first, as int64."""
    if block_NI.device.type != "cpu" or block_NI.dtype != torch.float32:
        return block_NI.abs().argsort(dim=1, stable=True)
    # magnitude and column in one whole number: NumPy sorts these with vector instructions, five times faster
    keys_NI = block_NI.abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys_NI.bitwise_or_(torch.arange(block_NI.shape[1]))
    keys_NI.numpy().sort(axis=1)
    return keys_NI.bitwise_and_(2**32 - 1)


def _highest_word(probability: Tensor) -> Tensor:
    """Return the highest int32 that is kept: of 2^32 words, `probability` (to 2^-33, at least one) are not above it."""
    kept = (probability * 2.0**32).round_().clamp_(min=1.0)
    return (kept - (2.0**31 + 1)).to(torch.int32)


def _l1_norm(delta_OI: Tensor, keep: Keep) -> float:
    """Return the sum of magnitudes of what is kept, in float64.

    Down the columns first: torch gives each of them to one thread, so the sum is the same at any number of threads.
    """
    total_I = torch.zeros(delta_OI.shape[1], dtype=torch.float64, device=delta_OI.device)
    for rows in row_blocks(delta_OI):
        kept_NI = keep(widened(delta_OI[rows]), rows.start * delta_OI.shape[1])
        total_I += kept_NI.abs().sum(dim=0, dtype=torch.float64)
    return math.fsum(total_I.tolist())
