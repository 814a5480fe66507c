"""How many answers a user may send, by a clock that the test moves."""

from __future__ import annotations

import random

import pytest

from personalized_soups.serving.protocol import token_buckets
from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.token_buckets import TokenBuckets


def _takes(buckets: TokenBuckets, user: str) -> int | None:
    """Take a token. Return None, or the seconds of the Retry-After header of a 429."""
    try:
        buckets.take(user)
    except ApiError as error:
        return int(error.headers["Retry-After"]) if error.status == 429 else -1
    return None


def test_a_full_bucket_is_emptied_and_fills_again_token_by_token() -> None:
    now = [100.0]
    buckets = TokenBuckets(4, clock=lambda: now[0])  # a token in 15 s
    assert [_takes(buckets, "ada") for _ in range(6)] == [None] * 4 + [15, 15]
    assert _takes(buckets, "bo") is None
    now[0] += 14.5
    assert _takes(buckets, "ada") == 1
    now[0] += 0.5
    assert [_takes(buckets, "ada") for _ in range(2)] == [None, 15]
    now[0] += 1000
    assert [_takes(buckets, "ada") for _ in range(5)] == [None] * 4 + [15]


def test_it_agrees_with_a_bucket_that_is_counted() -> None:
    rng = random.Random(0)
    for per_minute in (1, 7, 60):
        now, tokens, outcomes = [0.0], float(per_minute), set()
        buckets = TokenBuckets(per_minute, clock=lambda now=now: now[0])  # type: ignore[misc]
        for _ in range(2000):
            waited = rng.choice([0.0, 0.0, 0.25, 0.5, 3.0]) * 60 / per_minute
            now[0] += waited
            tokens = min(per_minute, tokens + waited * per_minute / 60)
            is_taken = tokens >= 1 - 1e-6
            tokens -= is_taken
            outcomes.add(is_taken)
            assert (_takes(buckets, "ada") is None) == is_taken
        assert outcomes == {True, False}


def test_memory_is_bounded_and_the_user_seen_longest_ago_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_buckets, "_MAX_USERS", 2)
    buckets = TokenBuckets(1, clock=lambda: 0.0)
    for user in ("a", "b"):
        assert _takes(buckets, user) is None
    assert _takes(buckets, "a") == 60
    assert _takes(buckets, "c") is None  # drops "a", whose last token is the oldest
    assert [_takes(buckets, user) for user in ("b", "c")] == [60, 60]
    assert len(buckets._full_at) == 2
