"""From a request to its answers: prompts are encoded and submitted, what comes is written as the protocol has it."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from personalized_soups import __version__
from personalized_soups.errors import SoupError
from personalized_soups.generation.generator import Generator
from personalized_soups.generation.prompts import encode_prompt
from personalized_soups.serving.engine.batcher import Batcher
from personalized_soups.serving.engine.request import GenerationRequest, Piece
from personalized_soups.serving.engine.token_sampler import TokenLogprobs
from personalized_soups.serving.protocol.expert_files import ExpertFiles
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.metrics import Metrics
from personalized_soups.serving.protocol.piece_queue import HungUpError, PieceQueue, pieces_of
from personalized_soups.serving.protocol.profile_resolver import SOUP, ProfileResolver, ResolvedProfile
from personalized_soups.serving.protocol.requests import AnswerRequest, ChatRequest

# Longer prompts are encoded on another thread: the event loop streams to everybody else.
_LONG = 8192

_DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class AnswerContext:
    """What answers are made with.

    Args:
        batcher: makes them.
        doorkeeper: knows for whom.
        generator: encodes prompts.
        metrics: count.
        files: of the experts, which the fingerprint tells.
        default_max_tokens: where a request says nothing.
        request_seconds: that a request may take.
    """

    batcher: Batcher
    doorkeeper: ProfileResolver
    generator: Generator
    metrics: Metrics
    files: ExpertFiles
    default_max_tokens: int
    request_seconds: float


@dataclass(eq=False)
class Answer:
    """One answer as far as it has come."""

    num_tokens: int = 0
    parts: list[str] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True, eq=False)
class PendingAnswers(ABC):
    """A request that has been submitted, and how its answers are written.

    Args:
        kitchen: that makes them.
        request: as it was sent.
        guest: for whom.
        asks: one for each answer.
        num_prompt_tokens: of all prompts.
    """

    kitchen: AnswerContext
    request: AnswerRequest
    guest: ResolvedProfile
    asks: Sequence[GenerationRequest]
    num_prompt_tokens: int
    began: float
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a whole answer as the protocol writes it."""

    @abstractmethod
    def head(self, index: int) -> dict[str, Any] | None:
        """Return what a stream says of an answer before its first token; None where that is nothing."""

    @abstractmethod
    def delta(self, index: int, text: str, likely: Any, finish: str | None) -> dict[str, Any]:
        """Return what a stream says of an answer's next part."""

    @abstractmethod
    def logprobs(self, likely: Sequence[tuple[int, TokenLogprobs]], start: int) -> Any:
        """Return tokens' log-probabilities as the protocol writes them; `start` is where their text begins."""

    def token_text(self, token: int) -> str:
        """Return what one token says by itself."""
        decoded = self.kitchen.generator.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return str(decoded)

    def told_of(self, piece: Piece) -> list[tuple[int, TokenLogprobs]]:
        """Return a piece's token with its log-probabilities; none of an end token, which is no part of the text."""
        if piece.logprobs is None or piece.token is None or piece.token in self.kitchen.generator.stop_ids:
            return []
        return [(piece.token, piece.logprobs)]

    def envelope(self, kind: str, identity: str) -> dict[str, Any]:
        """Return what stands around choices."""
        return {
            "id": identity,
            "object": kind,
            "created": self.created,
            "model": self.guest.model,
            "system_fingerprint": f"psoups-{__version__}-{self.kitchen.files.fingerprint}",
        }

    def usage(self, num_answer_tokens: int) -> dict[str, Any]:
        """Return how many tokens there were."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_answer_tokens,
            "total_tokens": self.num_prompt_tokens + num_answer_tokens,
        }

    async def pieces(self, receive: Receive) -> AsyncGenerator[Sequence[tuple[int, Piece]]]:
        """Yield what comes of the answers.

        Raises:
            ApiError: what went wrong with one of them, or the time that is over.
            HungUpError: if the client has gone.
        """
        metrics = self.kitchen.metrics
        seen: set[int] = set()
        source = pieces_of(self.kitchen.batcher, self.asks, receive=receive, seconds=self.kitchen.request_seconds)
        try:
            async with aclosing(source):
                async for pieces in source:
                    for index, piece in pieces:
                        if piece.error is not None:
                            raise api_error(piece.error, status=422)
                        if index not in seen:
                            seen.add(index)
                            metrics.first_token(time.perf_counter() - self.began)
                    yield pieces
        except TimeoutError:
            raise ApiError(
                504, f"no answer within {self.kitchen.request_seconds:g} s; ask for fewer tokens", code="timeout"
            ) from None
        finally:
            metrics.answered(time.perf_counter() - self.began)

    async def whole_response(self, receive: Receive) -> Response:
        """Return all answers at once.

        Raises:
            ApiError: as `pieces`.
        """
        answers = [Answer() for _ in self.asks]
        try:
            async with aclosing(self.pieces(receive)) as source:
                async for pieces in source:
                    for index, piece in pieces:
                        answer = answers[index]
                        answer.num_tokens += 1
                        answer.parts.append(piece.text)
                        answer.logprobs += self.told_of(piece)
                        answer.finish = piece.finish
        except HungUpError:
            return Response(status_code=499)  # nobody reads it
        body = self.envelope(self.whole, self.prefix + secrets.token_hex(12))
        body["choices"] = [self.choice(index, answer) for index, answer in enumerate(answers)]
        body["usage"] = self.usage(sum(answer.num_tokens for answer in answers))
        return Response(_json(body), media_type="application/json")


class EventStream(Response):
    """A response whose parts are sent as they come (server-sent events).

    Args:
        order: whose answers they are.
        receive: of ASGI, after the body.
    """

    media_type = "text/event-stream"

    def __init__(self, order: PendingAnswers, receive: Receive) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._order = order
        self._receive = receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; what goes wrong before the first part is an error like any other."""
        is_begun = False
        try:
            async with aclosing(self._parts()) as parts:
                async for part in parts:
                    if not is_begun:
                        is_begun = True
                        await send(
                            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        )
                    await send({"type": "http.response.body", "body": part, "more_body": True})
        except (HungUpError, OSError):
            return
        except ApiError as fault:
            if not is_begun:
                raise
            await send({"type": "http.response.body", "body": _event(fault.body()), "more_body": True})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _parts(self) -> AsyncGenerator[bytes]:
        order = self._order
        told = order.envelope(order.chunk, order.prefix + secrets.token_hex(12))
        frame = _Frame(told, with_usage=order.request.includes_usage)
        answers = [Answer() for _ in order.asks]
        lengths = [0] * len(answers)  # of the tokens' texts, some of which is told later only
        async with aclosing(order.pieces(self._receive)) as source:
            async for pieces in source:
                part = b""
                for index, piece in pieces:
                    answer = answers[index]
                    if not answer.num_tokens and (head := order.head(index)) is not None:
                        part += frame.around(head)
                    answer.num_tokens += 1
                    told_of = order.told_of(piece)
                    likely = order.logprobs(told_of, lengths[index]) if told_of else None
                    lengths[index] += sum(len(order.token_text(token)) for token, _ in told_of)
                    if piece.text or piece.finish is not None or likely is not None:
                        part += frame.around(order.delta(index, piece.text, likely, piece.finish))
                if part:
                    yield part
        if order.request.includes_usage:
            usage = order.usage(sum(answer.num_tokens for answer in answers))
            yield _event({**told, "choices": [], "usage": usage})


class _Frame:
    """Writes events that differ in one choice only: what stands around it is written once."""

    def __init__(self, envelope: Mapping[str, Any], *, with_usage: bool) -> None:
        self._before = f'data: {_json(envelope)[:-1]},"choices":['.encode()
        self._after = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def around(self, choice: Mapping[str, Any]) -> bytes:
        return self._before + _json(choice).encode() + self._after


async def submit(
    kitchen: AnswerContext, request: AnswerRequest, prompts: Sequence[Any], kind: type[PendingAnswers], began: float
) -> PendingAnswers:
    """Let a request's answers be made: `n` for each prompt, one after another.

    Args:
        kitchen: that makes them.
        request: how.
        prompts: texts to be encoded as they are, chats, or token ids.
        kind: of what is to come of it.
        began: when the request came, by perf_counter.

    Raises:
        ApiError: if the request can't be honoured, or too much waits already.
    """
    _check_number(kitchen, len(prompts) * request.num_choices)
    find = partial(kitchen.doorkeeper.guest, request.model, request.profile)
    guest = await run_in_threadpool(find) if request.model.startswith(SOUP) else find()
    encoded = await _encoded(kitchen.generator, prompts)
    most = kitchen.batcher.limits.max_context
    waiter = PieceQueue()
    seed = secrets.randbits(63)
    asks: list[GenerationRequest] = []
    for place, tokens in enumerate(tokens for tokens in encoded for _ in range(request.num_choices)):
        asks.append(
            GenerationRequest(
                tokens,
                guest.weights,
                _num_new(kitchen, request, len(tokens), most),
                request.sampling_params(seed, place),
                request.stops,
                destination=(waiter, place),
            )
        )
    _check_bias(kitchen, request)
    try:
        kitchen.batcher.submit(asks)
    except SoupError as fault:
        raise api_error(fault, retry_after=kitchen.batcher.retry_after()) from fault
    num_prompt_tokens = sum(map(len, encoded))
    kitchen.metrics.asked(guest, len(asks), num_prompt_tokens)
    return kind(kitchen, request, guest, asks, num_prompt_tokens, began)


def _check_number(kitchen: AnswerContext, num_answers: int) -> None:
    """Raise if a request asks for more answers than there will ever be places for: before anything is made of it.

    Raises:
        ApiError: 400.
    """
    limits = kitchen.batcher.limits
    most = limits.max_rows + limits.max_waiting
    if num_answers > most:
        raise ApiError(
            400, f"{num_answers} answers are asked for at once; at most {most} may be", param="n", code="invalid_value"
        )


async def _encoded(generator: Generator, prompts: Sequence[Any]) -> list[list[int]]:
    def encode() -> list[list[int]]:
        return [_encode(generator, prompt) for prompt in prompts]

    if len(prompts) > 1 or sum(len(str(prompt)) for prompt in prompts) > _LONG:
        return await run_in_threadpool(encode)
    return encode()


def _encode(generator: Generator, prompt: Any) -> list[int]:
    from jinja2.exceptions import TemplateError

    is_tokens = isinstance(prompt, list) and isinstance(prompt[0], int)
    if is_tokens:
        size = generator.model.config.get_text_config(decoder=True).vocab_size
        if max(prompt) >= size:
            raise ApiError(
                400, f"there is no token {max(prompt)}; the base has {size}", param="prompt", code="invalid_value"
            )
        return list(prompt)
    try:
        if isinstance(prompt, str):
            tokens = list(map(int, generator.tokenizer(prompt, verbose=False)["input_ids"]))
        else:
            tokens = encode_prompt(generator.tokenizer, prompt)
    except TemplateError as fault:
        raise ApiError(
            400, f"the base's chat template refuses the messages: {fault}", param="messages", code="invalid_value"
        ) from fault
    except SoupError as fault:  # where the base lies is nobody's business
        raise ApiError(400, f"{fault.what}; {fault.mend}", param="messages", code="invalid_value") from fault
    if not tokens:
        raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
    return tokens


def _num_new(kitchen: AnswerContext, request: AnswerRequest, num_prompt: int, most: int) -> int:
    """Return at how many tokens an answer is cut.

    Raises:
        ApiError: if prompt and answer have no room in the context.
    """
    asked = request.num_tokens or request.default_max_tokens
    wanted = asked if asked is not None else max(1, min(kitchen.default_max_tokens, most - num_prompt))
    if num_prompt + wanted > most:
        raise ApiError(
            400,
            f"This model's maximum context length is {most} tokens; you requested {num_prompt + wanted} "
            f"({num_prompt} in the prompt, {wanted} for the answer)",
            param="max_tokens" if num_prompt < most else "messages" if isinstance(request, ChatRequest) else "prompt",
            code="context_length_exceeded",
        )
    return wanted


def _check_bias(kitchen: AnswerContext, request: AnswerRequest) -> None:
    size = kitchen.generator.model.config.get_text_config(decoder=True).vocab_size
    wrong = next((name for name in request.logit_bias or () if int(name) >= size), None)
    if wrong is not None:
        raise ApiError(400, f"there is no token {wrong}; the base has {size}", param="logit_bias", code="invalid_value")


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + _json(body).encode() + b"\n\n"


def _json(body: Mapping[str, Any]) -> str:
    # a lone surrogate would be no UTF-8: as an escape it is JSON all the same
    return json.dumps(body, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
