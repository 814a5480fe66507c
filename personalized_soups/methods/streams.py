"""Random numbers that depend on a key and an index alone: the same on any device, in any blocks, on any threads.

SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) read as a function of a
counter: the i-th word is `mix(key + (i + 1) * gamma)`. A stream's key comes from SHA-256 of a seed and names (of the
expert, of the module), so that no draw depends on what else is merged, or in which order. Each 64-bit word serves two
elements: element 2i has its low half, 2i + 1 its high half.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_WEYL = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31


@dataclass(frozen=True, slots=True)
class Stream:
    """An endless row of random 32-bit words, each found by its index.

    Args:
        key: of which the low 64 bits count.
    """

    key: int

    @classmethod
    def of(cls, seed: int, *names: str) -> Stream:
        """Return the stream of these names under `seed`; any other names or seed give an independent one."""
        told = json.dumps([seed, *names]).encode()
        return cls(int.from_bytes(hashlib.sha256(told).digest()[:8], "little"))

    def child(self, name: str) -> Stream:
        """Return the stream of a part, independent of this one and of every other part's."""
        return Stream.of(self.key, name)

    def words(self, count: int, device: torch.device | str = "cpu", *, start: int = 0) -> Tensor:
        """Return the words of the elements `start` to `start + count`, int32 in one dimension; they use all 32 bits."""
        first = start // 2
        mixed = torch.arange(first + 1, (start + count + 1) // 2 + 1, dtype=torch.int64, device=device)
        mixed.mul_(_signed(_WEYL)).add_(_signed(self.key))  # int64 wraps around, as the generator's 64 bits do
        for shift, factor in _ROUNDS:
            mixed.bitwise_xor_(_shifted(mixed, shift)).mul_(_signed(factor))
        mixed.bitwise_xor_(_shifted(mixed, _LAST_SHIFT))
        # every platform that torch has kernels for is little-endian: the low half stands first
        return mixed.view(torch.int32).narrow(0, start - 2 * first, count)

    def uniform(self, shape: Sequence[int], device: torch.device | str = "cpu", *, start: int = 0) -> Tensor:
        """Return float32 in [0, 1), multiples of 2^-24, of the elements `start` and on, row by row."""
        words = self.words(int(torch.Size(shape).numel()), device, start=start)
        # the arithmetic shift by 8 gives -2^23 to 2^23 - 1: both ends and every step are exact in float32
        return (words >> 8).to(torch.float32).add_(2.0**23).mul_(2.0**-24).view(*shape)


def _shifted(words: Tensor, shift: int) -> Tensor:
    """Return the logical shift to the right; torch's own keeps the sign."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)


def _signed(bits: int) -> int:
    """Return the int64 of the same 64 bits."""
    return (bits + 2**63) % 2**64 - 2**63
