"""`Scheduler`: decides at each step which requests are read, join the batch, leave it or fail."""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from personalized_soups.errors import RunError
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.batch import Batch, BatchRow
from personalized_soups.serving.engine.detokenizer import Detokenizer, silent_tokens
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.engine.queue import RequestQueue
from personalized_soups.serving.engine.request import Finish, GenerationRequest, Piece
from personalized_soups.serving.engine.token_sampler import Choice, TokenSampler

_log = logging.getLogger(__name__)

# The weight of the latest answer in the smoothed average time of an answer.
_NEWEST_SHARE = 0.1


@dataclass(eq=False, slots=True)
class _RunningRequest:
    """A request whose prompt is being read, or whose answer is being generated."""

    request: GenerationRequest
    row: BatchRow
    detokenizer: Detokenizer
    started: float = field(default_factory=time.monotonic)

    @property
    def num_left(self) -> int:
        """The number of tokens that the answer may still get."""
        return self.request.max_new_tokens - (len(self.row.tokens) - len(self.request.tokens))

    def piece(self, choice: Choice, stop_ids: Collection[int]) -> Piece:
        """Return the piece for the token that has just been appended to the row.

        Raises:
            RunError: if the logits of the token are infinite or NaN.
        """
        if not choice.is_sound:
            raise RunError(
                "the model returned logits that are infinite or NaN",
                where="weights",
                mend="use smaller weights, for example between 0 and 1",
            )
        token = choice.token
        if token in stop_ids and not self.request.ignore_eos:
            return Piece(token, self.detokenizer.end(), choice.logprobs, Finish.STOP)
        text = self.detokenizer.add(token)
        is_cut = self.num_left <= 0
        if is_cut:
            text += self.detokenizer.end()
        finish = Finish.STOP if self.detokenizer.is_stopped else Finish.LENGTH if is_cut else None
        return Piece(token, text, choice.logprobs, finish)


class Scheduler:
    """Runs requests in one batch, step by step. All calls must come from one thread.

    Between two steps, ended requests leave the batch and waiting requests join it. Prompts are read in groups, in the
    order in which they arrived. A group has at most `read_tokens` tokens. A longer prompt is read alone, in parts of
    `read_tokens` tokens, so that the running answers never wait long for their next token.

    Attributes:
        batch: the rows of the running requests.
        seconds_per_answer: smoothed average time of the latest answers; 0 before the first answer has ended.

    Args:
        model: the base with its experts and a tokenizer.
        queue: the waiting requests and jobs.
        limits: limits for the batch and its memory.

    Raises:
        UsageError: if the model does not support continuous batching.
    """

    def __init__(self, model: SoupModel, queue: RequestQueue, limits: Limits) -> None:
        self.batch = Batch(model, limits.cache_bytes)
        self.seconds_per_answer = 0.0
        self._model = model
        self._queue = queue
        self._limits = limits
        self._stop_ids = model.generator.stop_ids
        self._silent = silent_tokens(model.generator.tokenizer)
        self._running: dict[int, _RunningRequest] = {}  # the keys are the id() of each row
        self._reading: list[_RunningRequest] = []
        self._longest = 0  # tokens of the longest row, including the tokens that it may still get
        self._max_together = limits.max_rows  # maximum prompts in a group; lowered after an error such as full memory
        self._pieces: list[tuple[GenerationRequest, Piece]] = []

    @property
    def num_running(self) -> int:
        """The number of requests that were taken from the queue and have not ended."""
        return len(self._running) + len(self._reading)

    def drop_aborted(self) -> None:
        """Remove aborted requests from the queue, from the group that is being read, and from the batch."""
        aborted = self._queue.take_aborted()
        if aborted:
            self._reading = [running for running in self._reading if running.request not in aborted]
            self._leave([running for running in self._running.values() if running.request in aborted])

    def join(self) -> None:
        """Read tokens of waiting prompts. Requests whose prompts have been read completely join the batch."""
        if not self._reading:
            self._admit()
        if not self._reading:
            return
        try:
            choices = self.batch.read(
                [running.row for running in self._reading], self._limits.read_tokens, num_tokens=self._longest
            )
        except Exception as error:
            self._drop_faulty(error)
            return
        if choices is not None:
            self._max_together = min(self._limits.max_rows, 2 * self._max_together)
            with self._queue.lock:  # other threads must see each request in either _reading or _running
                joined, self._reading = self._reading, []
                self._running.update((id(running.row), running) for running in joined)
            self._record([running.row for running in joined], choices)

    def step(self) -> int:
        """Generate the next token of every row in the batch, and return the number of rows that got a token."""
        rows = list(self.batch.rows)
        if not rows:
            return 0
        try:
            choices = self.batch.step()
        except Exception:
            # Rows whose expert was removed fail. The other rows are unchanged, and get their tokens in the next step.
            faulty = _faulty(self._model, self._running.values())
            if not faulty:
                raise
            for running, error in faulty:
                self._pieces += _failed([running], error)
            self._leave([running for running, _ in faulty])
            return 0
        self._record(rows, choices)
        return len(rows)

    def take_pieces(self) -> list[tuple[GenerationRequest, Piece]]:
        """Remove and return the pieces that were generated since the last call."""
        pieces, self._pieces = self._pieces, []
        return pieces

    def fail_all(self, error: Exception) -> None:
        """End every running request with an error, and empty the batch."""
        self._pieces += _failed([*self._running.values(), *self._reading], error)
        self._running.clear()
        self._reading = []
        self.batch.clear()

    def cut_off(self, error: Exception) -> None:
        """End every running and waiting request with an error, and close the queue, because the batcher ends."""
        waiting = self._queue.cut_off(error)
        running = [running.request for running in (*self._running.values(), *self._reading)]
        self._running.clear()
        self._reading = []
        self._pieces += [(request, Piece(error=error)) for request in (*running, *waiting)]

    def _admit(self) -> None:
        """Take the next group of requests, whose prompts are read together, from the queue."""
        with self._queue.lock:  # so that other threads always see each request as waiting or as running
            admission = _Admission(self._limits, self.batch, self._running.values(), self._max_together)
            self._reading = [
                _RunningRequest(
                    request,
                    BatchRow(list(request.tokens), request.weights, TokenSampler(request.sampling_params)),
                    Detokenizer(self._model.generator.tokenizer, request.stops, self._silent),
                )
                for request in self._queue.take(admission.accept)
            ]
            self._longest = admission.longest

    def _drop_faulty(self, error: Exception) -> None:
        """End the requests that caused an error while their prompts were read, and put the others back into the queue.

        If the cause is unknown, for example if memory is full, the next group has half as many prompts.
        """
        faulty = _faulty(self._model, self._reading)
        if not faulty and len(self._reading) == 1:
            faulty = [(self._reading[0], error)]
        for running, its_error in faulty:
            self._pieces += _failed([running], its_error)
        failed = {id(running) for running, _ in faulty}
        again = [running.request for running in self._reading if id(running) not in failed]
        if not faulty:
            self._max_together = len(again) // 2
        with self._queue.lock:
            self._reading = []
            self._queue.put_back(again)

    def _record(self, rows: Sequence[BatchRow], choices: Sequence[Choice]) -> None:
        """Make pieces of the chosen tokens, and remove the rows whose answers have ended."""
        ended = []
        for row, choice in zip(rows, choices, strict=True):
            running = self._running[id(row)]
            try:
                piece = running.piece(choice, self._stop_ids)
            except Exception as error:
                self._pieces += _failed([running], error)
                ended.append(running)
                continue
            self._pieces.append((running.request, piece))
            if piece.is_last:
                ended.append(running)
                seconds, average = time.monotonic() - running.started, self.seconds_per_answer
                self.seconds_per_answer = average + _NEWEST_SHARE * (seconds - average) if average else seconds
        self._leave(ended)

    def _leave(self, ended: Sequence[_RunningRequest]) -> None:
        if ended:
            self.batch.remove([running.row for running in ended])
            for running in ended:
                del self._running[id(running.row)]


class _Admission:
    """Decides how many waiting prompts are read together. The limits of rows, memory and tokens must allow them.

    Args:
        limits: the limits of the batcher.
        batch: the batch that the requests will join.
        running: the requests that have joined the batch.
        max_together: maximum number of prompts that are read together.
    """

    def __init__(self, limits: Limits, batch: Batch, running: Collection[_RunningRequest], max_together: int) -> None:
        self._batch = batch
        self._read_tokens = limits.read_tokens
        self._max_prompts = min(limits.max_rows - len(running), max_together)
        self._num_running = len(running)
        self._num_prompts = 0
        self._width = 0  # tokens of the longest prompt; the other prompts are padded to this length
        self.longest = max((len(request.row.tokens) + request.num_left for request in running), default=0)

    def accept(self, request: GenerationRequest) -> bool:
        """Return whether a request's prompt can be read together with the accepted prompts. If so, accept it."""
        if self._num_prompts >= self._max_prompts:
            return False
        num_prompts = self._num_prompts + 1
        width = max(self._width, len(request.tokens))
        longest = max(self.longest, len(request.tokens) + request.max_new_tokens)
        # a single prompt with more than read_tokens tokens is accepted, because it is read in parts
        if num_prompts > 1 and width * num_prompts > self._read_tokens:
            return False
        num_rows = self._num_running + num_prompts
        # a request that runs alone may exceed the memory limit, because it would otherwise never run
        if num_rows > 1 and not self._batch.fits(num_rows, longest):
            return False
        self._num_prompts, self._width, self.longest = num_prompts, width, longest
        return True


def _faulty(model: SoupModel, group: Iterable[_RunningRequest]) -> list[tuple[_RunningRequest, Exception]]:
    """Return the requests whose weights the model rejects now, with the errors.

    The experts may have changed since a request was submitted.
    """
    faulty: list[tuple[_RunningRequest, Exception]] = []
    for running in group:
        try:
            model.resolve(running.request.weights)
        except Exception as error:
            faulty.append((running, error))
    return faulty


def _failed(group: Iterable[_RunningRequest], error: Exception) -> list[tuple[GenerationRequest, Piece]]:
    """Log an error, and return pieces that end the requests with this error."""
    _log.error("generating an answer failed", exc_info=error)
    # the traceback refers to tensors, and a receiver could keep them in memory by keeping the error
    error.__traceback__ = None
    return [(running.request, Piece(error=error)) for running in group]
