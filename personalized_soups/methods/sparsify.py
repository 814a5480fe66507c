"""Rules that keep some entries of a delta and set the other entries to 0: by magnitude, at random, or both.

Each rule is a `Keep`: a function of a block of rows and of the flat index of the block's first element in the delta.
The block is float32 or float64. The rule returns the sparsified block and changes no argument. If it keeps all entries,
it may return the block itself.

Shapes: O = out_features, I = in_features, N = rows of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from personalized_soups.methods.blocks import row_blocks, widened
from personalized_soups.methods.streams import Stream

Keep = Callable[[Tensor, int], Tensor]

# Bits per digit of the radix select. IEEE 754 magnitudes have the same order as their bit patterns, so the k-th largest
# magnitude is found digit by digit. Counting into 2^16 bins is twice as fast as a partition and six times as fast as
# torch.kthvalue.
_DIGIT = 16


def trim(threshold: float) -> Keep:
    """Return the rule that keeps each entry whose magnitude is at least `threshold`.

    A threshold of 0 keeps all entries. An infinite threshold keeps none.
    """
    if threshold == 0:
        return lambda block_NI, _start: block_NI

    def keep(block_NI: Tensor, _start: int) -> Tensor:
        # hardshrink needs one pass and no mask. It keeps only magnitudes above its bound, so the bound is the largest
        # float below `threshold`.
        bound = torch.nextafter(torch.tensor(threshold, dtype=block_NI.dtype), torch.zeros((), dtype=block_NI.dtype))
        return torch.hardshrink(block_NI, float(bound))

    return keep


def drop(density: float, stream: Stream) -> Keep:
    """Return the rule that keeps each entry with probability `density`, without rescaling (DARE, arXiv 2311.03099).

    Word i of the stream decides whether to keep element i of the delta.
    """
    if density >= 1:
        return lambda block_NI, _start: block_NI
    highest = _highest_word(torch.tensor(density, dtype=torch.float64))

    def keep(block_NI: Tensor, start: int) -> Tensor:
        words = stream.words(block_NI.numel(), block_NI.device, start=start).view(block_NI.shape)
        return block_NI * (words <= int(highest))

    return keep


def drop_small(density: float, epsilon: float, stream: Stream, *, rescales: bool) -> Keep:
    """Return the rule that keeps larger entries of a row with higher probability (MAGPRUNE, arXiv 2406.11617).

    Rank the I entries of a row by magnitude, from 0 for the smallest entry. The entry of rank j is kept with
    probability `p = density - epsilon + 2 epsilon j / (I - 1)`. Of two equal magnitudes, the earlier entry has the
    lower rank. In a row of one entry, p is `density`. If `rescales` is set, each kept entry is divided by its p.

    Raises:
        ValueError: if a probability would not be above 0 and at most 1.
    """
    if density - epsilon <= 0 or density + epsilon > 1:
        raise ValueError(
            f"the keep-probabilities are {density - epsilon:g} to {density + epsilon:g}; "
            "they must be above 0 and at most 1"
        )
    if density >= 1 and epsilon == 0:
        return lambda block_NI, _start: block_NI

    def keep(block_NI: Tensor, start: int) -> Tensor:
        width = block_NI.shape[1]
        device = block_NI.device
        spread = epsilon if width > 1 else 0.0
        # clamped, as linspace may exceed its end by an ulp
        p_I = torch.linspace(density - spread, density + spread, width, dtype=torch.float64).clamp_(max=1.0)
        order_NI = _ascending(block_NI)
        # scatter writes the j-th probability into the column of rank j
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
    """Return the rule that applies `keep` and then divides the kept entries by `divisor`."""
    return keep if divisor == 1 else lambda block_NI, start: keep(block_NI, start).div(divisor)


def matched(keep: Keep, delta_OI: Tensor) -> Keep:
    """Return the rule that applies `keep` and then restores the L1 norm of the whole delta.

    mergekit's `rescale_norm` does the same. If the norm before or after `keep` is below 1e-7 (mergekit's bound), the
    rule does not rescale.
    """
    before = _l1_norm(delta_OI, lambda block_NI, _start: block_NI)
    after = _l1_norm(delta_OI, keep)
    return keep if min(before, after) < 1e-7 else scaled(keep, after / before)


def num_kept(density: float, count: int, at_least: int = 0) -> int:
    """Return how many of `count` entries trimming keeps: `density * count`, rounded down as in PEFT and mergekit.

    The number is at least `at_least` and at most `count`.
    """
    return min(count, max(at_least, int(density * count)))


def threshold(delta_OI: Tensor, density: float, *, at_least: int = 0) -> float:
    """Return the magnitude of the k-th largest entry, with `k = num_kept(density, O * I, at_least)`.

    It is the argument of `trim`.
    """
    return global_threshold(lambda: (delta_OI,), density, at_least=at_least)


def global_threshold(deltas: Callable[[], Iterable[Tensor]], density: float, *, at_least: int = 0) -> float:
    """Return the k-th largest magnitude of all deltas together. It is computed exactly, by a radix select.

    Args:
        deltas: a function that returns the same matrices on each call. It is called twice, or four times for float64.
            Only one matrix is in use at a time. 16-bit floats are converted to float32.
        density: the share that determines k, `int(density * count)` for `count` entries in total.
        at_least: the smallest k.

    Returns:
        The magnitude. It is 0, which keeps all entries, if `density` is 1 or there are no entries. It is infinity,
        which keeps no entry, if k is 0.
    """
    first = next(iter(deltas()), None)
    if density >= 1 or first is None:
        return 0.0
    dtype = widened(first[:0]).dtype
    left = dtype.itemsize * 8 - 1  # bits still unknown; the sign bit is not part of a magnitude
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
        # Count from the largest digit down. The digit of the k-th largest magnitude is the first one at which the count
        # reaches `remaining`.
        from_above = counts.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_above, remaining))
        remaining -= int(from_above[place - 1]) if place else 0
        prefix = (prefix or 0) << width | (2**width - 1 - place)
    words = torch.int32 if dtype == torch.float32 else torch.int64
    return float(torch.tensor(prefix, dtype=words).view(dtype))


def _digit_counts(deltas: Iterable[Tensor], prefix: int | None, shift: int, width: int) -> Tensor:
    """Count how often each value of one digit occurs. The digit has `width` bits and is `shift` bits from the end.

    If `prefix` is not None, only magnitudes count whose bits above the digit equal `prefix`.
    """
    counts = torch.zeros(2**width, dtype=torch.int64)
    for words in _magnitudes(deltas):
        if prefix is not None:
            words = words[words >> (shift + width) == prefix] & (2 ** (shift + width) - 1)  # noqa: PLW2901
        counts += torch.bincount(words >> shift, minlength=2**width).cpu()
    return counts


def _magnitudes(deltas: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the bit patterns of the magnitudes, block by block, as new one-dimensional tensors."""
    for delta_OI in deltas:
        for rows in row_blocks(delta_OI):
            block = widened(delta_OI[rows]).abs().flatten()
            yield block.view(torch.int32 if block.dtype == torch.float32 else torch.int64)


def _ascending(block_NI: Tensor) -> Tensor:
    """Return the int64 column indices that sort each row by magnitude. Equal magnitudes stay in order."""
    if block_NI.device.type != "cpu" or block_NI.dtype != torch.float32:
        return block_NI.abs().argsort(dim=1, stable=True)
    # A key has the bits of the magnitude above the bits of the column, so the column decides between equal magnitudes.
    # NumPy sorts int64 with vector instructions, five times faster than a stable argsort.
    keys_NI = block_NI.abs().view(torch.int32).long().bitwise_left_shift_(32)
    keys_NI.bitwise_or_(torch.arange(block_NI.shape[1]))
    keys_NI.numpy().sort(axis=1)
    return keys_NI.bitwise_and_(2**32 - 1)


def _highest_word(probability: Tensor) -> Tensor:
    """Return the int32 word h such that a random word w satisfies `w <= h` with the given probability.

    The number of words up to h is `probability * 2^32`, rounded, but at least 1.
    """
    # the smallest word is -2^31, so the largest of the n smallest words is n - 2^31 - 1, which float64 holds exactly
    kept = (probability * 2.0**32).round_().clamp_(min=1.0)
    return (kept - (2.0**31 + 1)).to(torch.int32)


def _l1_norm(delta_OI: Tensor, keep: Keep) -> float:
    """Return the sum of the magnitudes of the entries that `keep` keeps, in float64."""
    # Each column is summed first. torch sums a column in one thread, so the result does not depend on the number of
    # threads.
    total_I = torch.zeros(delta_OI.shape[1], dtype=torch.float64, device=delta_OI.device)
    for rows in row_blocks(delta_OI):
        kept_NI = keep(widened(delta_OI[rows]), rows.start * delta_OI.shape[1])
        total_I += kept_NI.abs().sum(dim=0, dtype=torch.float64)
    return math.fsum(total_I.tolist())
