"""What the server tells Prometheus: how much waits, how full the batch is, how fast tokens come, and for whom."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from personalized_soups.serving.engine.batcher import Load
from personalized_soups.serving.protocol.profile_resolver import ResolvedProfile

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)

CONTENT_TYPE = CONTENT_TYPE_LATEST


class Metrics:
    """Counts for one server.

    Args:
        max_rows: places in the batch.
        by_user: count by user, too: whoever reads the metrics then reads the users' names.
    """

    def __init__(self, max_rows: int, *, by_user: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._by_user = by_user
        gauge = partial(Gauge, registry=self.registry, namespace="psoups")
        counter = partial(Counter, registry=self.registry, namespace="psoups")
        histogram = partial(Histogram, registry=self.registry, namespace="psoups")
        self._waiting = gauge("waiting_answers", "Answers that wait for a place in the batch.")
        self._running = gauge("running_answers", "Answers that are being made.")
        self._occupancy = gauge("batch_occupancy", "Share of the batch's places that are taken.")
        self._cache = gauge("cache_bytes", "Bytes of keys and values that room is made for.")
        self._rows = histogram("step_rows", "Rows of each decoding step.", buckets=_ROWS)
        self._step = histogram("step_seconds", "Seconds of each decoding step.", buckets=_STEP_SECONDS)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts that were read.")
        self._answer_tokens = counter("answer_tokens", "Tokens that were generated.")
        self._speed = gauge("answer_tokens_per_second", "Tokens a second, over the last steps.")
        self._first = histogram(
            "time_to_first_token_seconds", "Seconds from a request to its first token.", buckets=_SECONDS
        )
        self._whole = histogram("request_seconds", "Seconds of each request for answers.", buckets=_SECONDS)
        self._requests = counter("requests", "Requests, by route and status.", ["route", "status"])
        self._profiles = counter("answers", "Answers, by the kind of profile.", ["profile"])
        self._users = counter("user_answers", "Answers, by user.", ["user"]) if by_user else None
        self._max_rows = max_rows
        self._per_second = 0.0

    def step(self, num_rows: int, seconds: float) -> None:
        """Take note of a decoding step."""
        self._rows.observe(num_rows)
        self._step.observe(seconds)
        self._answer_tokens.inc(num_rows)
        self._per_second += 0.05 * (num_rows / max(seconds, 1e-6) - self._per_second)

    def first_token(self, seconds: float) -> None:
        """Take note of an answer's first token, which its prompt's reading brought."""
        self._first.observe(seconds)
        self._answer_tokens.inc()

    def asked(self, guest: ResolvedProfile, num_answers: int, num_prompt_tokens: int) -> None:
        """Take note of what is about to be answered."""
        self._profiles.labels(guest.kind).inc(num_answers)
        self._prompt_tokens.inc(num_prompt_tokens)
        if self._users is not None and guest.user is not None:
            self._users.labels(guest.user).inc(num_answers)

    def answered(self, seconds: float) -> None:
        """Take note of a request for answers that is done."""
        self._whole.observe(seconds)

    def responded(self, route: str, status: int) -> None:
        """Take note of a response."""
        self._requests.labels(route, str(status)).inc()

    def page(self, load: Load) -> bytes:
        """Return the text that Prometheus reads."""
        self._waiting.set(load.waiting)
        self._running.set(load.running)
        self._occupancy.set(load.running / self._max_rows)
        self._cache.set(load.cache_bytes)
        self._speed.set(self._per_second if load.running else 0.0)
        return generate_latest(self.registry)
