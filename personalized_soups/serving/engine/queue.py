"""`RequestQueue`: the requests and jobs that wait for the batcher.

Requests wait for a free row, and jobs wait until no answer is being generated. Any thread may append requests and jobs.
Only the batcher's thread removes them.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from personalized_soups.errors import RunError
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.engine.request import GenerationRequest

T = TypeVar("T")

# An idle batcher keeps its memory for this time, because allocating the memory takes as long as reading a few prompts.
_IDLE_SECONDS = 10.0

# An idle batcher that gets a request starts when no further request has arrived for _QUIET_SECONDS, and at the latest
# after _GATHER_SECONDS.
_QUIET_SECONDS = 0.001
_GATHER_SECONDS = 0.04


class QueueFullError(RunError):
    """More requests would wait than the limits allow."""


class ClosedError(RunError):
    """The batcher was closed."""


@dataclass(frozen=True, eq=False, slots=True)
class Job:
    """A function that runs on the batcher's thread while no answer is being generated.

    Attributes:
        function: the function to call, without arguments.
        future: gets the function's result or exception.
    """

    function: Callable[[], Any]
    future: Future[Any]

    def run(self) -> None:
        """Call the function, unless the future was cancelled."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            with torch.inference_mode(False):  # so that other threads can change tensors that the job creates
                result = self.function()
        except BaseException as error:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)

    def fail(self, error: Exception) -> None:
        """Set an exception as the result of the future, without calling the function."""
        if self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class RequestQueue:
    """The requests and jobs that wait for the batcher.

    Requests are removed in the order in which they arrived. Jobs and requests take turns: one group of waiting requests
    is answered between two jobs.

    Attributes:
        lock: a reentrant lock that every method acquires. Hold it around several calls that must see the same state.
        waiting: the waiting requests. The oldest request is first.
        is_closed: whether new requests and jobs are rejected.

    Args:
        limits: the maximum numbers of waiting requests and of rows.
    """

    def __init__(self, limits: Limits) -> None:
        self.lock = threading.Condition()  # reentrant
        self._limits = limits
        self.waiting: deque[GenerationRequest] = deque()
        self._aborted: set[GenerationRequest] = set()
        self._jobs: deque[Job] = deque()
        self.is_closed = False
        self._is_cut_off = False
        self._is_gathering = False
        self._is_turn_of_requests = False  # a job has run, so waiting requests are taken before the next job

    def put(self, requests: Sequence[GenerationRequest], num_running: int) -> None:
        """Append requests. If they do not all fit, none is appended.

        Args:
            requests: requests that have passed GenerationRequest.check.
            num_running: number of requests that were taken from the queue and have not ended.

        Raises:
            QueueFullError: if more requests would wait than the limits allow.
            ClosedError: if the queue was closed.
        """
        with self.lock:
            if self.is_closed:
                raise _closed()
            num_free = max(0, self._limits.max_rows - num_running)
            if len(self.waiting) + len(requests) > self._limits.max_waiting + num_free:
                raise QueueFullError(
                    f"{num_running} answers are being generated and {len(self.waiting)} are waiting; "
                    f"there is no room for {len(requests)} more",
                    where="queue",
                    mend="try again later",
                )
            self.waiting.extend(requests)
            if not self._is_gathering:
                self.lock.notify()

    def put_back(self, requests: Sequence[GenerationRequest]) -> None:
        """Insert requests in front of the waiting requests."""
        with self.lock:
            self.waiting.extendleft(reversed(requests))

    def put_job(self, function: Callable[[], T]) -> Future[T]:
        """Append a job, and return its future. If the queue is closed, the future has a ClosedError."""
        job = Job(function, Future())
        with self.lock:
            if self.is_closed:
                job.fail(_closed())
            else:
                self._jobs.append(job)
                self.lock.notify()
        return job.future

    def abort(self, requests: Iterable[GenerationRequest]) -> None:
        """Mark waiting and running requests as aborted. Requests that have already ended are ignored."""
        with self.lock:
            self._aborted.update(requests)
            self.lock.notify()

    def close(self, *, finish: bool) -> None:
        """Reject new requests and jobs.

        Args:
            finish: whether to finish the requests and jobs that have been accepted.
        """
        with self.lock:
            self.is_closed = True
            self._is_cut_off = self._is_cut_off or not finish
            self.lock.notify()

    def wait(self, *, is_busy: bool, on_idle: Callable[[], None]) -> bool:
        """Wait for work and return True. Return False if the queue is closed and no work is left.

        Args:
            is_busy: whether requests are running. In this case there is always work.
            on_idle: called when no work has arrived for _IDLE_SECONDS.
        """
        with self.lock:
            while not self._is_cut_off:
                if is_busy or self.waiting or self._jobs:
                    return True
                self._aborted.clear()
                if self.is_closed:
                    return False
                # check the state as well, because a notification that arrives together with the timeout is lost
                if not self.lock.wait(_IDLE_SECONDS) and not (
                    self.waiting or self._jobs or self._aborted or self.is_closed
                ):
                    on_idle()
                    self.lock.wait()
                self._gather()
            return False

    def take_aborted(self) -> set[GenerationRequest]:
        """Return the requests that were aborted since the last call, and remove them from `waiting`."""
        with self.lock:
            aborted, self._aborted = self._aborted, set()
            if aborted:
                self.waiting = deque(request for request in self.waiting if request not in aborted)
            return aborted

    def take_job(self, *, is_busy: bool) -> Job | None:
        """Remove and return the next job if it may run now. Otherwise return None.

        Args:
            is_busy: whether requests are running. A job must wait until they have ended.
        """
        with self.lock:
            if not self._jobs or is_busy or (self.waiting and self._is_turn_of_requests):
                return None
            self._is_turn_of_requests = True
            return self._jobs.popleft()

    def take(self, fits: Callable[[GenerationRequest], bool]) -> list[GenerationRequest]:
        """Remove and return waiting requests, oldest first, until `fits` returns False for a request.

        If a job must run first, no request is returned.
        """
        with self.lock:
            taken: list[GenerationRequest] = []
            if self._is_turn_of_requests or not self._jobs:
                while self.waiting and fits(self.waiting[0]):
                    taken.append(self.waiting.popleft())
                self._is_turn_of_requests = False
            return taken

    def cut_off(self, error: Exception) -> list[GenerationRequest]:
        """Close the queue, end its jobs with an error, and remove and return the waiting requests."""
        with self.lock:
            self.is_closed = True
            requests, self.waiting = list(self.waiting), deque()
            jobs, self._jobs = self._jobs, deque()
            for job in jobs:
                job.fail(error)
            return requests

    def _gather(self) -> None:
        """Wait until no request has arrived for a moment, so that prompts that arrive together are read together.

        Another thread appends the requests one by one, and it shares Python's global lock with this thread. If this
        thread started with the first request, the other requests would be delayed and read in groups of two or three.
        """
        end = time.monotonic() + _GATHER_SECONDS
        num_seen = 0
        while num_seen < len(self.waiting) < self._limits.max_rows and time.monotonic() < end:
            num_seen = len(self.waiting)
            self._is_gathering = True  # while this is True, put() does not wake this thread
            self.lock.wait(_QUIET_SECONDS)
            self._is_gathering = False
        self._is_turn_of_requests = False


def _closed() -> ClosedError:
    return ClosedError(
        "the server is shutting down", where="server", mend="send the request to another server, or send it again later"
    )
