"""`Batcher`: generates answers with continuous batching.

Requests wait in a queue, join the running batch when there is room, and leave it when their answers end.
"""

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
    """The present load of a batcher. It is used for metrics and for the Retry-After header.

    Attributes:
        waiting: number of requests that wait for a free row.
        running: number of requests whose prompts are being read or whose answers are being generated.
        cache_bytes: size of the memory allocated for keys and values, in bytes.
        seconds_per_answer: smoothed average time of the latest answers; 0 before the first answer has ended.
    """

    waiting: int
    running: int
    cache_bytes: int
    seconds_per_answer: float


class Batcher:
    """Generates answers on its own thread, with continuous batching.

    Attributes:
        model: the base with its experts.
        limits: the given limits. `max_context` is lower if the model allows only fewer tokens.

    Args:
        model: the base with its experts and a tokenizer.
        deliver: called by the batcher's thread after each step with all pieces of this step and their requests. If
            `deliver` raises an exception, it is called again for each piece. If it raises an exception for a piece, the
            request of this piece is aborted.
        limits: limits for the queue, the batch and its memory.
        on_step: called after each decoding step with the number of rows and the seconds that the step took.

    Raises:
        UsageError: if the model does not support continuous batching.
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
        """Append requests to the queue. If one of them is rejected, none is appended.

        Raises:
            InputError: if a prompt or an answer has no tokens, if both have too many tokens together, or if a token id
                is unknown.
            UsageError: if a weight depends on the number of the generated token.
            QueueFullError: if more requests would wait than the limits allow.
            ClosedError: if the batcher was closed.
        """
        for request in requests:
            request.check(vocab_size=self._vocab_size, max_context=self.limits.max_context)
        with self._queue.lock:
            self._queue.put(requests, self._scheduler.num_running)

    def abort(self, requests: Iterable[GenerationRequest]) -> None:
        """Stop generating the answers to these requests. Requests that have already ended are ignored."""
        self._queue.abort(requests)

    def run_when_idle(self, job: Callable[[], T]) -> Future[T]:
        """Call `job` on the batcher's thread while no answer is being generated, and return the future of its result.

        Experts can be changed in this way. Running answers are finished before the job, and waiting requests
        are started after it. Between two jobs, one group of waiting requests is answered.
        """
        return self._queue.put_job(job)

    @property
    def is_alive(self) -> bool:
        """Whether the batcher accepts requests."""
        return self._thread.is_alive() and not self._queue.is_closed

    @property
    def load(self) -> Load:
        """The present load."""
        scheduler = self._scheduler
        with self._queue.lock:
            return Load(
                len(self._queue.waiting),
                scheduler.num_running,
                scheduler.batch.num_bytes,
                scheduler.seconds_per_answer,
            )

    def retry_after(self) -> int:
        """Return the estimated number of seconds until a row is free, from 1 to 60."""
        load = self.load
        answers_before = load.waiting / self.limits.max_rows
        return max(1, min(60, round(load.seconds_per_answer * answers_before)))

    def close(self, *, finish: bool = True, timeout: float | None = None) -> bool:
        """Reject new requests, tell the batcher's thread to end, and return whether it has ended.

        Args:
            finish: whether to finish the accepted requests. If False, they end with a ClosedError.
            timeout: maximum number of seconds to wait for the thread; None waits until it has ended.
        """
        self._queue.close(finish=finish)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    # The methods below run on the batcher's thread.

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
            # end all requests even if an error ended the loop, so that no client waits forever
            self._scheduler.cut_off(
                ClosedError("the server has shut down", where="server", mend="send the request again")
            )
            self._send()
            self._scheduler.batch.clear()

    def _wait(self) -> bool:
        """Wait for work and return True. Return False if the queue is closed and no work is left."""
        is_busy = self._scheduler.num_running > 0
        if not is_busy:
            self._scheduler.batch.release()  # other threads may use the model meanwhile
        return self._queue.wait(is_busy=is_busy, on_idle=self._scheduler.batch.clear)

    def _turn(self) -> None:
        """Run a job, if one is due. Otherwise let requests join or leave, and decode one token of each answer."""
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
