"""Random numbers that depend only on a key and an index. They are the same on any device, in any blocks and threads.

The generator is SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) as a
function of a counter: the i-th 64-bit word is `mix(key + (i + 1) * gamma)`. The key is a SHA-256 digest of a seed and
of names (of the expert and the module). So the random numbers of an expert do not depend on the other experts or on the
order of merging. Each 64-bit word provides the random words of two elements: the low half for element 2i, and the high
half for element 2i + 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15  # gamma: 2^64 over the golden ratio, rounded to an odd number
# the mixing function of SplitMix64: (right shift for the xor, factor) for each round
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


@dataclass(frozen=True, slots=True)
class Stream:
    """An endless sequence of random 32-bit words that can be read from any index.

    Attributes:
        key: the key of the sequence. Only its low 64 bits have an effect.
    """

    key: int

    @classmethod
    def of(cls, seed: int, *names: str) -> Stream:
        """Return the stream of `seed` and `names`. Streams of different seeds or names are independent."""
        # JSON separates the names unambiguously: ("ab", "c") and ("a", "bc") differ
        text = json.dumps([seed, *names]).encode()
        return cls(int.from_bytes(hashlib.sha256(text).digest()[:8], "little"))

    def child(self, name: str) -> Stream:
        """Return the stream of a part with this name. It is independent of this stream and of the other parts."""
        return Stream.of(self.key, name)

    def words(self, count: int, device: torch.device | str = "cpu", *, start: int = 0) -> Tensor:
        """Return the words of the elements from `start` to `start + count - 1`.

        The result is a one-dimensional int32 tensor. The words are uniform over all 2^32 values.
        """
        first = start // 2
        mixed = torch.arange(first + 1, (start + count + 1) // 2 + 1, dtype=torch.int64, device=device)
        mixed.mul_(_signed(_WEYL)).add_(_signed(self.key))  # int64 overflow wraps, as the algorithm needs
        for shift, factor in _ROUNDS:
            mixed.bitwise_xor_(_shifted(mixed, shift)).mul_(_signed(factor))
        mixed.bitwise_xor_(_shifted(mixed, _LAST_SHIFT))
        # torch runs only on little-endian platforms, so the low half of each word comes first in the view
        return mixed.view(torch.int32).narrow(0, start - 2 * first, count)

    def uniform(self, shape: Sequence[int], device: torch.device | str = "cpu", *, start: int = 0) -> Tensor:
        """Return float32 numbers in [0, 1) for the elements from `start` on, in row-major order.

        The numbers are multiples of 2^-24.
        """
        words = self.words(int(torch.Size(shape).numel()), device, start=start)
        # The arithmetic shift by 8 gives whole numbers from -2^23 to 2^23 - 1, which float32 holds exactly. So nothing
        # is rounded, and 1.0 never occurs.
        return (words >> 8).to(torch.float32).add_(2.0**23).mul_(2.0**-24).view(*shape)


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Return the words shifted right, with zeros at the left. torch's own shift copies the sign bit instead."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(bits: int) -> int:
    """Return the int64 that has the same 64 bits as the unsigned number `bits`."""
    return (bits + 2**63) % 2**64 - 2**63
