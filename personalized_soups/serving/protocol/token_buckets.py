"""`TokenBuckets`: limits how many requests each user may send in a minute."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from personalized_soups.serving.protocol.faults import ApiError

# The greatest number of users whose buckets are kept. A user whose bucket was dropped starts with a full one.
_MAX_USERS = 10_000


class TokenBuckets:
    """One token bucket for each user. A request takes a token, and tokens come back at a constant rate.

    Threads may share an object.

    Args:
        per_minute: the number of requests in a minute, at least 1. A bucket holds as many tokens.
        clock: returns the time in seconds. It never goes back.

    Example:
        >>> buckets = TokenBuckets(2, clock=lambda: 0.0)
        >>> buckets.take("ada"), buckets.take("ada")
        (None, None)
        >>> buckets.take("ada")
        Traceback (most recent call last):
        ...
        personalized_soups.serving.protocol.faults.ApiError: more than 2 answers in a minute; try again in 30 s
    """

    def __init__(self, per_minute: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._capacity = per_minute
        self._clock = clock
        self._lock = threading.Lock()
        # For each user, the time at which the bucket is full again. The bucket that was used last is the last one.
        self._full_at: OrderedDict[str, float] = OrderedDict()

    def take(self, user: str) -> None:
        """Take one token of a user.

        Raises:
            ApiError: 429 if the user has no token. Its Retry-After header says when there is one.
        """
        seconds_per_token = 60 / self._capacity
        with self._lock:
            now = self._clock()
            # The generic cell rate algorithm: a bucket that lacks k tokens is full again after k * seconds_per_token.
            full_at = max(now, self._full_at.get(user, now)) + seconds_per_token
            wait = full_at - now - 60
            if wait <= 1e-9:
                self._full_at[user] = full_at
                self._full_at.move_to_end(user)
                if len(self._full_at) > _MAX_USERS:
                    self._full_at.popitem(last=False)
                return
        seconds = max(1, math.ceil(wait - 1e-9))
        raise ApiError(
            429,
            f"more than {self._capacity} answers in a minute; try again in {seconds} s",
            code="too_many_answers",
            headers={"Retry-After": str(seconds)},
        )
