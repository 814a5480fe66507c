"""The server's metrics for Prometheus: the queue, the batch, the speed of generation, and the kinds of profiles."""

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
    """The metrics of one server.

    Attributes:
        registry: prometheus_client's registry with all metrics.

    Args:
        max_rows: number of rows of a full batch.
        by_user: whether answers are also counted for each user. Everyone who can read the metrics then sees the users'
            names.
    """

    def __init__(self, max_rows: int, *, by_user: bool = False) -> None:
        self.registry = CollectorRegistry()
        self._by_user = by_user
        gauge = partial(Gauge, registry=self.registry, namespace="psoups")
        counter = partial(Counter, registry=self.registry, namespace="psoups")
        histogram = partial(Histogram, registry=self.registry, namespace="psoups")
        self._waiting = gauge("waiting_answers", "Answers that wait for a free row of the batch.")
        self._running = gauge("running_answers", "Answers that are being generated.")
        self._occupancy = gauge("batch_occupancy", "Share of the batch's rows that are in use.")
        self._cache = gauge("cache_bytes", "Bytes allocated for keys and values.")
        self._rows = histogram("step_rows", "Rows of a decoding step.", buckets=_ROWS)
        self._step = histogram("step_seconds", "Seconds that a decoding step took.", buckets=_STEP_SECONDS)
        self._prompt_tokens = counter("prompt_tokens", "Tokens of submitted prompts.")
        self._answer_tokens = counter("answer_tokens", "Generated tokens.")
        self._speed = gauge("answer_tokens_per_second", "Generated tokens per second, averaged over the last steps.")
        self._first = histogram(
            "time_to_first_token_seconds", "Seconds from a request to its first token.", buckets=_SECONDS
        )
        self._whole = histogram("request_seconds", "Seconds from a request for answers to its end.", buckets=_SECONDS)
        self._requests = counter("requests", "Requests by route and HTTP status.", ["route", "status"])
        self._profiles = counter("answers", "Answers by kind of profile.", ["profile"])
        self._users = counter("user_answers", "Answers by user.", ["user"]) if by_user else None
        self._max_rows = max_rows
        self._per_second = 0.0

    def step(self, num_rows: int, seconds: float) -> None:
        """Record a decoding step that generated one token in each of `num_rows` rows."""
        self._rows.observe(num_rows)
        self._step.observe(seconds)
        self._answer_tokens.inc(num_rows)
        self._per_second += 0.05 * (num_rows / max(seconds, 1e-6) - self._per_second)

    def first_token(self, seconds: float) -> None:
        """Record the first token of an answer and the seconds since the request arrived.

        The first token results from reading the prompt, so `step` does not count it.
        """
        self._first.observe(seconds)
        self._answer_tokens.inc()

    def submitted(self, profile: ResolvedProfile, num_answers: int, num_prompt_tokens: int) -> None:
        """Count the answers and prompt tokens of a submitted request."""
        self._profiles.labels(profile.kind).inc(num_answers)
        self._prompt_tokens.inc(num_prompt_tokens)
        if self._users is not None and profile.user is not None:
            self._users.labels(profile.user).inc(num_answers)

    def answered(self, seconds: float) -> None:
        """Record the seconds of a request that has ended, successfully or not."""
        self._whole.observe(seconds)

    def responded(self, route: str, status: int) -> None:
        """Count a response by route and HTTP status."""
        self._requests.labels(route, str(status)).inc()

    def page(self, load: Load) -> bytes:
        """Return all metrics in Prometheus' text format. `load` is the present load of the batcher."""
        self._waiting.set(load.waiting)
        self._running.set(load.running)
        self._occupancy.set(load.running / self._max_rows)
        self._cache.set(load.cache_bytes)
        self._speed.set(self._per_second if load.running else 0.0)
        return generate_latest(self.registry)
