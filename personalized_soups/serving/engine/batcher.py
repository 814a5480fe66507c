"""Continuous batching: requests wait in one queue, join the running batch when there is room, and leave when done."""

from __future__ import annotations

import logging
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, TypeVar

import torch

from personalized_soups.errors import InputError, RunError, UsageError
from personalized_soups.mixing.mixture import Row
from personalized_soups.mixing.model import SoupModel
from personalized_soups.serving.engine.batch import Batch, BatchRow
from personalized_soups.serving.engine.detokenizer import Detokenizer, silent_tokens
from personalized_soups.serving.engine.token_sampler import Choice, SamplingParams, TokenLogprobs, TokenSampler

_log = logging.getLogger(__name__)

T = TypeVar("T")


# So long an idle batcher keeps its room: to make it anew takes as long as to read a few prompts.
_IDLE_SECONDS = 10.0

# An idle batcher begins when nobody has come for a moment, and after so long at the latest.
_MOMENT_SECONDS = 0.001
_GATHER_SECONDS = 0.04


class Finish(StrEnum):
    """Why an answer is at its end; the words are those of OpenAI's protocol."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Piece:
    """What one step adds to an answer.

    Args:
        token: that was chosen; None where the step brought none.
        text: what can be told now; may be empty.
        likely: its log-probabilities, where they are asked for.
        finish: why nothing comes after it; None while more comes.
        fault: what ended the answer, in place of an end of its own.
    """

    token: int | None = None
    text: str = ""
    likely: TokenLogprobs | None = None
    finish: Finish | None = None
    fault: Exception | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing comes after it."""
        return self.finish is not None or self.fault is not None


@dataclass(eq=False)
class GenerationRequest:
    """One answer that somebody waits for.

    Args:
        tokens: the prompt's.
        weights: whose soup it is, checked by SoupModel.row.
        max_new_tokens: the answer is cut there.
        wishes: how its tokens are chosen.
        stops: strings at which it ends.
        ignore_end: go on after an end token (for benchmarks).
    """

    tokens: Sequence[int]
    weights: Row
    max_new_tokens: int
    wishes: SamplingParams = field(default_factory=SamplingParams)
    stops: Sequence[str] = ()
    ignore_end: bool = False
    # what its maker waits with; not looked at here
    waiter: Any = None


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is done at once.

    Args:
        max_rows: answers that are made at once.
        max_waiting: answers that wait for a place; more are refused.
        max_context: tokens of a prompt and its answer together.
        read_tokens: tokens of prompts that are read between two steps of the others: more makes prompts wait less, and
            running answers falter more.
        cache_bytes: of keys and values; None is without limit.

    Raises:
        ValueError: if nothing could be done at all.
    """

    max_rows: int = 64
    max_waiting: int = 1024
    max_context: int = 4096
    read_tokens: int = 4096
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_context", "read_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


class QueueFullError(RunError):
    """As many answers wait as may."""


class ClosedError(RunError):
    """The server is about to end, and takes nothing new."""


@dataclass(eq=False, slots=True)
class _RunningRequest:
    """An answer that is being made, or whose prompt is being read."""

    ask: GenerationRequest
    row: BatchRow
    text: Detokenizer
    num_prompt: int
    began: float

    @property
    def num_left(self) -> int:
        """Tokens that may still come."""
        return self.ask.max_new_tokens - (len(self.row.tokens) - self.num_prompt)


@dataclass(frozen=True, slots=True)
class Load:
    """What is going on: for metrics, and to say when to come back."""

    waiting: int
    running: int
    cache_bytes: int
    seconds_per_answer: float


class Batcher:
    """Answers what is asked on a thread of its own, in one batch that never stops for one of its rows.

    Between two steps rows that are done or given up leave, and waiting ones join: prompts are read together, in the
    order they came, `read_tokens` at a time (a longer prompt in parts of that size), so that running answers are never
    held up for long.

    Args:
        model: base and experts, with a tokenizer.
        deliver: is given, after each step, every piece that it brought with its ask; called by the batcher's thread.
            It takes all or raises: then pieces are handed to it one by one, and an answer whose piece it does not take
            is given up.
        limits: how much is done at once.
        on_step: is told the rows of each step and the seconds that it took.

    Raises:
        UsageError: if the model's rows cannot be kept in slots.
    """

    def __init__(
        self,
        model: SoupModel,
        deliver: Callable[[Sequence[tuple[GenerationRequest, Piece]]], None],
        limits: Limits | None = None,
        *,
        on_step: Callable[[int, float], None] | None = None,
    ) -> None:
        self.model = model
        limits = limits or Limits()
        most = min(limits.max_context, most_tokens(model.model.config))
        self.limits = replace(limits, max_context=most)  # as the model has it
        self._deliver = deliver
        self._on_step = on_step
        self._batch = Batch(model, self.limits.cache_bytes)
        self._stop_ids = model.generator.stop_ids
        self._silent = silent_tokens(model.generator.tokenizer)
        self._num_embedded = int(model.model.get_input_embeddings().num_embeddings)
        self._changed = threading.Condition()
        # under `_changed`:
        self._waiting: deque[GenerationRequest] = deque()
        self._given_up: set[GenerationRequest] = set()
        self._jobs: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_closed = False
        self._is_cut = False
        self._is_gathering = False
        self._is_turn_of_answers = False  # a job has been done, and others wait behind those who wait for answers
        # of the thread:
        self._running: dict[int, _RunningRequest] = {}  # by the row's id
        self._reading: list[_RunningRequest] = []
        self._longest = 0  # tokens of a row, with those that may still come
        self._most_together = self.limits.max_rows  # prompts: fewer while the device's memory is full
        self._pieces: list[tuple[GenerationRequest, Piece]] = []
        self._seconds_per_answer = 0.0
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, asks: Sequence[GenerationRequest]) -> None:
        """Let answers be made; those of one call are taken or refused together.

        Raises:
            InputError: if one of them has no prompt, no room for its answer, or tokens that the model does not know:
                on a GPU those would end the process.
            UsageError: if a weight follows the tokens.
            QueueFullError: if there would be more waiting than may.
            ClosedError: if nothing new is taken.
        """
        for ask in asks:
            self._check(ask)
        with self._changed:
            if self._is_closed:
                raise ClosedError("the server is about to end", where="server", mend="ask another one, or later")
            free = self.limits.max_rows - len(self._running) - len(self._reading)
            if len(self._waiting) + len(asks) > self.limits.max_waiting + max(0, free):
                raise QueueFullError(
                    f"all places are taken, and {len(self._waiting)} answers wait: no room for {len(asks)} more",
                    where="queue",
                    mend="come back later",
                )
            self._waiting.extend(asks)
            if not self._is_gathering:
                self._changed.notify()

    def give_up(self, asks: Iterable[GenerationRequest]) -> None:
        """Let go of answers that nobody waits for any more; those that are done already are passed over."""
        with self._changed:
            self._given_up.update(asks)
            self._changed.notify()

    def between(self, job: Callable[[], T]) -> Future[T]:
        """Call something once no answer is being made, on the batcher's thread: experts change here.

        Running answers are finished first, waiting ones wait; between two calls some of these are answered.
        """
        future: Future[T] = Future()
        with self._changed:
            if self._is_closed:
                future.set_exception(ClosedError("the server is about to end", where="server", mend="start it anew"))
                return future
            self._jobs.append((job, future))
            self._changed.notify()
        return future

    @property
    def is_alive(self) -> bool:
        """Whether it takes what is asked."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def load(self) -> Load:
        """What is going on."""
        with self._changed:
            running = len(self._running) + len(self._reading)
            return Load(len(self._waiting), running, self._batch.num_bytes, self._seconds_per_answer)

    def retry_after(self) -> int:
        """Return in how many seconds a place may be free."""
        load = self.load
        ahead = load.waiting / self.limits.max_rows
        return max(1, min(60, round(load.seconds_per_answer * ahead)))

    def close(self, *, finish: bool = True, timeout: float | None = None) -> bool:
        """Take nothing new, finish what was taken (or cut it off), end the thread, and return whether it has ended."""
        with self._changed:
            self._is_closed = True
            self._is_cut = self._is_cut or not finish
            self._changed.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def _check(self, ask: GenerationRequest) -> None:
        tokens = [*ask.tokens, *ask.wishes.logit_bias]
        if not ask.tokens or ask.max_new_tokens < 1:
            raise InputError(
                f"there are {len(ask.tokens)} tokens of a prompt, and {ask.max_new_tokens} may be answered",
                where="prompt",
                mend="give at least one, and let at least one be answered",
            )
        if min(tokens) < 0 or max(tokens) >= self._num_embedded:
            raise InputError(
                f"there are tokens from {min(tokens)} to {max(tokens)}, the base has {self._num_embedded}",
                where="prompt or logit_bias",
                mend="encode the prompt with the base's own tokenizer",
            )
        if (num_tokens := len(ask.tokens) + ask.max_new_tokens) > self.limits.max_context:
            raise InputError(
                f"prompt and answer have up to {num_tokens} tokens, {self.limits.max_context} may be",
                where="prompt",
                mend="shorten it, or ask for a shorter answer",
            )
        if ask.weights.is_scheduled:
            raise UsageError(
                "a weight is a function of the token's number, and rows of a running batch are at different ones",
                where="weights",
                mend="give numbers, or answer with SoupModel.generate",
            )

    # The thread.

    def _run(self) -> None:
        try:
            with torch.inference_mode():
                while self._wait():
                    try:
                        self._turn()
                    except Exception as fault:
                        self._fail_all(fault)
                    self._send()
        finally:
            # whatever has ended it, nobody waits in vain
            with self._changed:
                self._is_closed = True
                self._cut_off()
            self._send()
            self._batch.clear()

    def _wait(self) -> bool:
        """Sleep until there is something to do, and return whether there is."""
        with self._changed:
            while not self._is_cut:
                if self._running or self._reading or self._waiting or self._jobs:
                    return True
                self._given_up.clear()
                if self._is_closed:
                    return False
                self._batch.release()
                if not self._changed.wait(_IDLE_SECONDS):
                    self._batch.clear()
                    self._changed.wait()
                self._gather()
            return False

    def _gather(self) -> None:
        """Let those who ask at once be read at once: wait until nobody has come for a moment. The lock is held.

        A crowd's requests arrive one by one, taken up by a thread that shares Python's lock with this one: to begin
        with the first would hold up the others, and read their prompts in twos and threes.
        """
        end = time.monotonic() + _GATHER_SECONDS
        num_seen = 0
        while num_seen < len(self._waiting) < self.limits.max_rows and time.monotonic() < end:
            num_seen = len(self._waiting)
            self._is_gathering = True  # nobody notifies
            self._changed.wait(_MOMENT_SECONDS)
            self._is_gathering = False
        self._is_turn_of_answers = False  # a job has been done, and others wait behind those who wait for answers

    def _turn(self) -> None:
        """Let rows leave and join, and make one step."""
        began = time.perf_counter()
        self._leave(self._take_given_up())
        job = self._next_job()
        if job is not None:
            self._batch.release()
            _do(*job)
            return
        self._join()
        self._send()  # first tokens do not wait for the others' step
        rows = list(self._batch.rows)
        if rows and self._step(rows) and self._on_step is not None:
            try:
                self._on_step(len(rows), time.perf_counter() - began)
            except Exception:
                _log.exception("a step could not be told of")

    def _step(self, rows: Sequence[BatchRow]) -> bool:
        """Let every row have its next token; return whether they have."""
        try:
            choices = self._batch.step()
        except Exception:
            # one whose expert is gone is at fault alone; nothing has changed for the others
            faulty = self._faulty(self._running.values())
            if not faulty:
                raise
            for each, fault in faulty:
                self._fail([each], fault)
            self._leave([each for each, _ in faulty])
            return False
        self._note(rows, choices)
        return True

    def _take_given_up(self) -> list[_RunningRequest]:
        """Return the running rows that are given up, and forget the waiting ones."""
        with self._changed:
            if not self._given_up:
                return []
            gone, self._given_up = self._given_up, set()
            self._waiting = deque(ask for ask in self._waiting if ask not in gone)
            self._reading = [each for each in self._reading if each.ask not in gone]
            return [each for each in self._running.values() if each.ask in gone]

    def _next_job(self) -> tuple[Callable[[], Any], Future[Any]] | None:
        with self._changed:
            is_free = not (self._running or self._reading or (self._waiting and self._is_turn_of_answers))
            if not self._jobs or not is_free:
                return None
            self._is_turn_of_answers = True
            return self._jobs.popleft()

    def _join(self) -> None:
        """Read waiting prompts, and let those that are read whole join the batch."""
        if not self._reading:
            with self._changed:
                if self._is_turn_of_answers or not self._jobs:
                    self._reading = self._next_group()
                    self._is_turn_of_answers = False
        if not self._reading:
            return
        try:
            choices = self._batch.read(
                [each.row for each in self._reading], self.limits.read_tokens, num_tokens=self._longest
            )
        except Exception as fault:
            self._drop_faulty(fault)
            return
        if choices is not None:
            joined, self._reading = self._reading, []
            self._most_together = min(self.limits.max_rows, 2 * self._most_together)
            self._running.update((id(each.row), each) for each in joined)
            self._note([each.row for each in joined], choices)

    def _drop_faulty(self, fault: Exception) -> None:
        """Fail those of the prompts being read that are at fault; where that can't be told, read fewer together."""
        faulty = self._faulty(self._reading)
        if not faulty and len(self._reading) == 1:
            faulty = [(self._reading[0], fault)]
        for each, its in faulty:
            self._fail([each], its)
        failed = {id(each) for each, _ in faulty}
        again = [each.ask for each in self._reading if id(each) not in failed]
        if not faulty:
            self._most_together = len(again) // 2
        self._reading = []
        with self._changed:
            self._waiting.extendleft(reversed(again))

    def _faulty(self, group: Iterable[_RunningRequest]) -> list[tuple[_RunningRequest, Exception]]:
        """Return those whose weights are none of the model's any more: experts may have changed since they asked."""
        found: list[tuple[_RunningRequest, Exception]] = []
        for each in group:
            try:
                self.model.row(each.ask.weights)
            except Exception as fault:
                found.append((each, fault))
        return found

    def _next_group(self) -> list[_RunningRequest]:
        """Take from the queue what can be read together now: there are places, memory, and not too many tokens."""
        group: list[_RunningRequest] = []
        width = 0  # of the prompts, padded
        places = min(self.limits.max_rows - len(self._running), self._most_together)
        longest = max((len(each.row.tokens) + each.num_left for each in self._running.values()), default=0)
        while self._waiting and len(group) < places:
            ask = self._waiting[0]
            wider = max(width, len(ask.tokens))
            longer = max(longest, len(ask.tokens) + ask.max_new_tokens)
            num_rows = len(self._running) + len(group) + 1
            is_alone = num_rows == 1
            is_much = bool(group) and wider * (len(group) + 1) > self.limits.read_tokens
            if is_much or not (is_alone or self._batch.fits(num_rows, longer)):
                break
            self._waiting.popleft()
            row = BatchRow(list(ask.tokens), ask.weights, TokenSampler(ask.wishes))
            text = Detokenizer(self.model.generator.tokenizer, ask.stops, self._silent)
            group.append(_RunningRequest(ask, row, text, len(ask.tokens), time.monotonic()))
            width, longest = wider, longer
        self._longest = longest
        return group

    def _note(self, rows: Sequence[BatchRow], choices: Sequence[Choice]) -> None:
        """Turn chosen tokens into pieces, and let rows that are done leave."""
        done = []
        for row, choice in zip(rows, choices, strict=True):
            running = self._running[id(row)]
            try:
                piece = self._piece(running, choice)
            except Exception as fault:
                self._fail([running], fault)
                done.append(running)
            else:
                self._pieces.append((running.ask, piece))
                if piece.is_last:
                    done.append(running)
                    self._took(time.monotonic() - running.began)
        self._leave(done)

    def _piece(self, running: _RunningRequest, choice: Choice) -> Piece:
        if not choice.is_sound:
            raise RunError(
                "the model's output is no number", where="weights", mend="give smaller weights, such as from 0 to 1"
            )
        token = choice.token
        if token in self._stop_ids and not running.ask.ignore_end:
            return Piece(token, running.text.end(), choice.likely, Finish.STOP)
        text = running.text.add(token)
        is_cut = running.num_left <= 0
        if is_cut:
            text += running.text.end()
        finish = Finish.STOP if running.text.is_stopped else Finish.LENGTH if is_cut else None
        return Piece(token, text, choice.likely, finish)

    def _took(self, seconds: float) -> None:
        before = self._seconds_per_answer
        self._seconds_per_answer = before + 0.1 * (seconds - before) if before else seconds

    def _leave(self, gone: Sequence[_RunningRequest]) -> None:
        if gone:
            self._batch.remove([each.row for each in gone])
            for each in gone:
                del self._running[id(each.row)]

    def _send(self) -> None:
        pieces, self._pieces = self._pieces, []
        if not pieces:
            return
        try:
            self._deliver(pieces)
        except Exception:
            _log.exception("pieces could not be delivered together")
            for ask, piece in pieces:
                self._send_alone(ask, piece)

    def _send_alone(self, ask: GenerationRequest, piece: Piece) -> None:
        try:
            self._deliver([(ask, piece)])
        except Exception:
            _log.exception("a piece could not be delivered: its answer is given up")
            self.give_up([ask])

    def _fail(self, group: Iterable[_RunningRequest], fault: Exception) -> None:
        _log.error("an answer failed", exc_info=fault)
        # its frames hold tensors, and whoever waits may keep it
        fault.__traceback__ = None
        self._pieces.extend((each.ask, Piece(fault=fault)) for each in group)

    def _fail_all(self, fault: Exception) -> None:
        """Tell everybody in the batch of a fault, and begin with an empty one."""
        self._fail([*self._running.values(), *self._reading], fault)
        self._running.clear()
        self._reading = []
        self._batch.clear()

    def _cut_off(self) -> None:
        """End everything that was taken; the lock is held."""
        fault = ClosedError("the server has ended", where="server", mend="ask again")
        asks = [*(each.ask for each in (*self._running.values(), *self._reading)), *self._waiting]
        self._running.clear()
        self._reading = []
        self._waiting.clear()
        self._pieces.extend((ask, Piece(fault=fault)) for ask in asks)
        jobs, self._jobs = self._jobs, deque()
        for _, future in jobs:
            if future.set_running_or_notify_cancel():
                future.set_exception(fault)


def most_tokens(config: Any) -> int:
    """Return how many tokens a model's rows may have without changing each other's."""
    text = config.get_text_config(decoder=True)
    ropes: Any = getattr(text, "rope_parameters", None) or {}
    most = [
        getattr(text, "max_position_embeddings", None),
        # beyond it all rows of a batch are rotated in another way, short ones too
        *(
            rope.get("original_max_position_embeddings")
            for rope in (ropes, *ropes.values())
            if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
        ),
    ]
    return min((each for each in most if isinstance(each, int)), default=sys.maxsize)


def _do(job: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        with torch.inference_mode(False):  # what a job makes may be changed elsewhere
            result = job()
    except BaseException as fault:
        future.set_exception(fault)
    else:
        future.set_result(result)
