"""The queue by itself: its waiting, which the batcher's tests reach only at rare moments."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.engine.queue import RequestQueue
from personalized_soups.serving.engine.request import GenerationRequest


@pytest.mark.parametrize(
    ("arrive", "has_work"),
    [
        (lambda queue: queue.put([GenerationRequest([7], ExpertWeights(), 1)], 0), True),
        (lambda queue: queue.put_job(lambda: None), True),
        (lambda queue: queue.close(finish=True), False),
    ],
)
def test_what_arrives_together_with_the_idle_timeout_is_noticed(
    monkeypatch: pytest.MonkeyPatch, arrive: Callable[[RequestQueue], object], has_work: bool
) -> None:
    queue = RequestQueue(Limits())
    timeouts: list[float | None] = []

    def time_out(timeout: float | None = None) -> bool:
        assert timeout is not None, "the queue waits for a notification that was sent already"
        timeouts.append(timeout)
        if len(timeouts) == 1:
            arrive(queue)  # notifies no thread: its wait has just ended
        return False

    monkeypatch.setattr(queue.lock, "wait", time_out)

    def on_idle() -> None:
        raise AssertionError("the queue is not idle")

    assert queue.wait(is_busy=False, on_idle=on_idle) == has_work
