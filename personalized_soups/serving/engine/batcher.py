"""Continuous batching: requests wait in a queue, join the running batch when there is room, and leave when they end."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.limits import Limits, max_context_of
from personalized_soups.serving.engine.queue import ClosedError, RequestQueue
from personalized_soups.serving.engine.request import GenerationRequest, Piece
from personalized_soups.serving.engine.scheduler import Scheduler

_log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Load:
    """How much a batcher has to do: for metrics and for the Retry-After header.

    Attributes:
        waiting: requests that wait for a free row.
        running: requests whose prompts are being read or whose answers are being generated.
        cache_bytes: bytes allocated for keys and values.
        seconds_per_answer: how long an answer took, smoothed over the last ones; 0 before the first one.
    """

    waiting: int
    running: int
    cache_bytes: int
    seconds_per_answer: float


class Batcher:
    """Generates answers on its own thread, in one batch that never stops for one of its rows.

    Attributes:
        model: base and experts.
        limits: how much is generated at once, with `max_context` as the model allows it.

    Args:
        model: base and experts, with a tokenizer.
        deliver: called by the batcher's thread after each step, with all pieces of that step and their requests. If it
            raises, it is called again for each piece separately; a request whose piece it rejects again is aborted.
        limits: how much is generated at once.
        on_step: called after each decoding step with the number of rows and the seconds that the step took.

    Raises:
        UsageError: if rows of the model cannot join and leave a batch.
    """

    def __init__(
        self,
        model: SoupModel,
        deliver: Callable[[Sequence[tuple[GenerationRequest, Piece]]], None],
        limits: Limits | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        limits = limits or Limits()
        self.model = model
        self.limits = replace(limits, max_context=min(limits.max_context, max_context_of(model.model.config)))
        self._deliver = deliver
        self._on_step = on_step
        self._vocab_size = int(model.model.get_input_embeddings().num_embeddings)
        self._queue = RequestQueue(self.limits)
        self._scheduler = Scheduler(model, self._queue, self.limits)
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[GenerationRequest]) -> None:
        """Queue requests: all of them, or none.

        Raises:
            InputError: if a request has no prompt, no room for its answer, or a token that the model does not know.
            UsageError: if a weight depends on the generated token's number.
            QueueFullError: if more requests would wait than the limits allow.
            ClosedError: if the batcher was closed.
        """
        for request in requests:
            request.check(vocab_size=self._vocab_size, max_context=self.limits.max_context)
        with self._queue.lock:
            self._queue.put(requests, self._scheduler.num_running)

    def abort(self, requests: Iterable[GenerationRequest]) -> None:
        """Stop generating answers that nobody waits for. Requests that have ended are ignored."""
        self._queue.abort(requests)

    def run_when_idle(self, job: Callable[[], T]) -> Future[T]:
        """Call a function on the batcher's thread while no answer is being generated, for example to change experts.

        Running answers are finished first, and waiting requests wait; between two jobs, a group of them is answered.
        """
        return self._queue.put_job(job)

    @property
    def is_alive(self) -> bool:
        """Whether the batcher accepts requests."""
        return self._thread.is_alive() and not self._queue.is_closed

    @property
    def load(self) -> Load:
        """How much the batcher has to do."""
        scheduler = self._scheduler
        with self._queue.lock:
            return Load(
                len(self._queue.waiting),
                scheduler.num_running,
                scheduler.batch.num_bytes,
                scheduler.seconds_per_answer,
            )

    def retry_after(self) -> int:
        """Return after how many seconds a row is probably free."""
        load = self.load
        answers_before = load.waiting / self.limits.max_rows
        return max(1, min(60, round(load.seconds_per_answer * answers_before)))

    def close(self, *, finish: bool = True, timeout: float | None = None) -> bool:
        """Reject new requests, end the thread, and return whether it has ended.

        Args:
            finish: whether accepted requests are finished; False ends them with a ClosedError.
            timeout: seconds to wait for the thread; None waits until it has ended.
        """
        self._queue.close(finish=finish)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # The thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    try:
                        self._turn()
                    except Exception as error:
                        self._scheduler.fail_all(error)
                    self._send()
        finally:
            # no client waits forever, whichever error ended the thread
            self._scheduler.cut_off(
                ClosedError("the server has shut down", where="server", mend="send the request again")
            )
            self._send()
            self._scheduler.batch.clear()

    def _wait(self) -> bool:
        """Wait for work, and return whether there is any."""
        is_busy = self._scheduler.num_running > 0
        if not is_busy:
            self._scheduler.batch.release()  # other threads may use the model meanwhile
        return self._queue.wait(is_busy=is_busy, on_idle=self._scheduler.batch.clear)

    def _turn(self) -> None:
        """Let requests leave and join, and decode one token of each running answer; or run a job."""
        started = time.perf_counter()
        self._scheduler.drop_aborted()
        job = self._queue.take_job(is_busy=self._scheduler.num_running > 0)
        if job is not None:
            self._scheduler.batch.release()
            job.run()
            return
        self._scheduler.join()
        self._send()  # first tokens are delivered before the step of the other rows
        num_rows = self._scheduler.step()
        if num_rows and self._on_step is not None:
            try:
                self._on_step(num_rows, time.perf_counter() - started)
            except Exception:
                _log.exception("on_step failed")

    def _send(self) -> None:
        pieces = self._scheduler.take_pieces()
        if not pieces:
            return
        try:
            self._deliver(pieces)
        except Exception:
            _log.exception("the pieces of a step could not be delivered together")
        else:
            return
        for request, piece in pieces:
            try:
                self._deliver([(request, piece)])
            except Exception:
                _log.exception("a piece could not be delivered; its request is aborted")
                self.abort([request])
