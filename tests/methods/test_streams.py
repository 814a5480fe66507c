from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from personalized_soups.methods.streams import Stream

MASK = 2**64 - 1


def splitmix64(seed: int, count: int) -> list[int]:
    """The generator as published: a state that steps, in Python's unbounded integers."""
    state, words = seed & MASK, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        words.append(z ^ (z >> 31))
    return words


def halves(seed: int, count: int) -> list[int]:
    """Words of 32 bits, unsigned: of each 64 the low half first."""
    return [half for word in splitmix64(seed, (count + 1) // 2) for half in (word & 0xFFFFFFFF, word >> 32)][:count]


def unsigned(words: torch.Tensor) -> list[int]:
    return [word % 2**32 for word in words.tolist()]


def test_the_words_are_those_of_the_published_generator() -> None:
    # the first outputs for seed 1234567, as implementations of SplitMix64 in other languages print them
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert unsigned(Stream(1234567).words(6)) == halves(1234567, 6)


@pytest.mark.parametrize("key", [0, 1, 2**31, 2**63 - 1, 2**63, MASK, 2**70 + 5])
def test_every_key_agrees_with_unbounded_integers(key: int) -> None:
    assert unsigned(Stream(key).words(257)) == halves(key, 257)


def test_any_block_of_a_stream_is_a_slice_of_it() -> None:
    stream = Stream.of(3, "expert", "module")
    whole = stream.words(1001)
    for start, count in itertools.product((0, 1, 2, 17, 500), (0, 1, 2, 333, 501)):
        assert torch.equal(stream.words(count, start=start), whole[start : start + count])
    far = 2**40 + 1
    assert torch.equal(stream.words(9, start=far), stream.words(12, start=far - 3)[3:])


def test_threads_change_nothing() -> None:
    stream, threads = Stream.of(0, "x"), torch.get_num_threads()
    once = stream.words(300_001)
    try:
        torch.set_num_threads(2 if threads == 1 else 1)
        assert torch.equal(stream.words(300_001), once)
    finally:
        torch.set_num_threads(threads)


def test_names_and_seeds_make_streams_apart() -> None:
    keys = [
        Stream.of(seed, *names).key
        for seed in (0, 1, 2**53)
        for names in ((), ("a",), ("a", "b"), ("ab",), ("b", "a"), ("a", ""), ('a","b',))
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key <= MASK for key in keys)
    assert Stream.of(0, "a") == Stream.of(0, "a")
    assert len({Stream.of(0, "a").child("A").key, Stream.of(0, "a").child("B").key, Stream.of(0, "a").key}) == 3


def test_uniform_is_the_upper_bits_of_the_words() -> None:
    # a word counts as a signed number from -2^31, so that -2^31 gives 0
    want = [((word + 2**31) % 2**32 >> 8) / 2**24 for word in halves(77, 60)]
    got = Stream(77).uniform((5, 12))
    assert got.shape == (5, 12)
    assert got.dtype == torch.float32
    assert got.flatten().tolist() == want
    assert Stream(77).uniform((2, 12), start=24).flatten().tolist() == want[24:48]


@pytest.mark.parametrize("shift", [0, 4, 8, 24, 28])
def test_chi_square_of_the_bits(shift: int) -> None:
    """Sixteen bins of four bits, n = 2^20 words: chi-square with 15 degrees of freedom.

    Laurent and Massart (2000): P(X >= k + 2 sqrt(k x) + 2 x) <= exp(-x); x = 14 makes 7e-7 a case, and the key is
    fixed. The lower tail, P(X <= k - 2 sqrt(k x)) <= exp(-x), is below 0 here and says nothing.
    """
    words = Stream.of(5, "chi").words(2**20).numpy().view(np.uint32)
    counts = np.bincount(words >> shift & 15, minlength=16)
    expected = len(words) / 16
    bound = 15 + 2 * math.sqrt(15 * 14) + 28
    assert ((counts - expected) ** 2 / expected).sum() < bound


def test_streams_and_neighbours_do_not_correlate() -> None:
    """Centred uniforms of variance 1/12: a mean product of n pairs has the standard deviation 1 / (12 sqrt n).

    Six of them are exceeded with a probability below 2e-9 by a normal variable.
    """
    count = 2**18
    rows = [Stream.of(seed, name).uniform((count,)).double() - 0.5 for seed in (0, 1) for name in ("a", "b", "c")]
    rows.append(rows[0].roll(1))
    bound = 6 / (12 * math.sqrt(count))
    for one, other in itertools.combinations(rows, 2):
        assert abs(float((one * other).mean())) < bound
    # the mean itself has the standard deviation 1 / sqrt(12 n)
    for row in rows:
        assert abs(float(row.mean())) < 6 / math.sqrt(12 * count)
