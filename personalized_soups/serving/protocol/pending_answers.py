"""`PendingAnswers`: a submitted request. It collects the answers and writes them in the form of OpenAI's protocol."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, ClassVar

from starlette.responses import Response
from starlette.types import Receive

from personalized_soups import __version__
from personalized_soups.serving.engine.request import GenerationRequest, Piece
from personalized_soups.serving.engine.token_sampler import TokenLogprobs
from personalized_soups.serving.protocol.answer_context import AnswerContext
from personalized_soups.serving.protocol.faults import ApiError, api_error
from personalized_soups.serving.protocol.piece_queue import ClientDisconnectedError, pieces_of
from personalized_soups.serving.protocol.profile_resolver import ResolvedProfile
from personalized_soups.serving.protocol.requests import AnswerRequest


@dataclass(eq=False)
class Answer:
    """The part of an answer that has been generated so far.

    Attributes:
        num_tokens: number of generated tokens, including the end token.
        parts: the pieces of the text.
        logprobs: token ids with their log-probabilities, if the request asked for them; without the end token.
        finish: why the answer ended; None while it continues.
    """

    num_tokens: int = 0
    parts: list[str] = field(default_factory=list)
    logprobs: list[tuple[int, TokenLogprobs]] = field(default_factory=list)
    finish: str | None = None


@dataclass(frozen=True, eq=False)
class PendingAnswers(ABC):
    """A submitted request and the format of its answers. Each endpoint has its own subclass.

    Attributes:
        context: the parts of the server that are needed to answer.
        request: the request that the client sent.
        profile: the soup that generates the answers.
        generations: the batcher's requests, one for each answer.
        num_prompt_tokens: number of tokens of all prompts together.
        started: when the request arrived, by time.perf_counter().
        created: when the answers were submitted, in seconds since 1970.
        prefix: the start of the `id` of a response.
        whole: the value of `object` in a response that is not streamed.
        chunk: the value of `object` in an event of a stream.
    """

    context: AnswerContext
    request: AnswerRequest
    profile: ResolvedProfile
    generations: Sequence[GenerationRequest]
    num_prompt_tokens: int
    started: float
    created: int = field(default_factory=lambda: int(time.time()))

    prefix: ClassVar[str]
    whole: ClassVar[str]
    chunk: ClassVar[str]

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the entry of `choices` for a complete answer."""

    @abstractmethod
    def head(self, index: int) -> dict[str, Any] | None:
        """Return the entry of `choices` that a stream sends before an answer's first token; None if it sends none."""

    @abstractmethod
    def delta(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return the entry of `choices` that a stream sends for an answer's next piece."""

    @abstractmethod
    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]], start: int) -> Any:
        """Return the log-probabilities of tokens in the format of the endpoint.

        Args:
            tokens: token ids with their log-probabilities.
            start: number of characters of the answer before the first of these tokens.
        """

    def token_text(self, token: int) -> str:
        """Decode one token, without its neighbors, and return its text."""
        decoded = self.context.generator.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return str(decoded)

    def logprobs_of(self, piece: Piece) -> list[tuple[int, TokenLogprobs]]:
        """Return the piece's token with its log-probabilities, in a list.

        The list is empty for an end token, which has no text, and if the request asked for no log-probabilities.
        """
        if piece.logprobs is None or piece.token is None or piece.token in self.context.generator.stop_ids:
            return []
        return [(piece.token, piece.logprobs)]

    def envelope(self, kind: str, identity: str) -> dict[str, Any]:
        """Return all fields of a response or an event except `choices` and `usage`."""
        return {
            "id": identity,
            "object": kind,
            "created": self.created,
            "model": self.profile.model,
            "system_fingerprint": f"psoups-{__version__}-{self.context.files.fingerprint}",
        }

    def usage(self, num_answer_tokens: int) -> dict[str, Any]:
        """Return the `usage` of a response: the numbers of prompt and answer tokens."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": num_answer_tokens,
            "total_tokens": self.num_prompt_tokens + num_answer_tokens,
        }

    async def pieces(self, receive: Receive) -> AsyncGenerator[Sequence[tuple[int, Piece]]]:
        """Yield the pieces of the answers as they are generated, each piece with the index of its answer.

        Raises:
            ApiError: if an answer fails, or the request exceeds its time limit.
            ClientDisconnectedError: if the client closes the connection.
        """
        metrics, seconds = self.context.metrics, self.context.request_seconds
        begun: set[int] = set()
        source = pieces_of(self.context.batcher, self.generations, receive=receive, seconds=seconds)
        try:
            async with aclosing(source):
                async for pieces in source:
                    for index, piece in pieces:
                        if piece.error is not None:
                            raise api_error(piece.error, status=422)
                        if index not in begun:
                            begun.add(index)
                            metrics.first_token(time.perf_counter() - self.started)
                    yield pieces
        except TimeoutError:
            raise ApiError(
                504,
                f"the answer was not complete within {seconds:g} s; ask for fewer tokens with max_tokens",
                code="timeout",
            ) from None
        finally:
            metrics.answered(time.perf_counter() - self.started)

    async def whole_response(self, receive: Receive) -> Response:
        """Wait for all answers, and return them in one response.

        Raises:
            ApiError: if an answer fails, or the request exceeds its time limit.
        """
        answers = [Answer() for _ in self.generations]
        try:
            async with aclosing(self.pieces(receive)) as source:
                async for pieces in source:
                    for index, piece in pieces:
                        answer = answers[index]
                        answer.num_tokens += 1
                        answer.parts.append(piece.text)
                        answer.logprobs += self.logprobs_of(piece)
                        answer.finish = piece.finish
        except ClientDisconnectedError:
            return Response(status_code=499)  # never sent, only counted; nginx uses the same status
        body = self.envelope(self.whole, self.prefix + secrets.token_hex(12))
        body["choices"] = [self.choice(index, answer) for index, answer in enumerate(answers)]
        body["usage"] = self.usage(sum(answer.num_tokens for answer in answers))
        return Response(to_json(body), media_type="application/json")


def to_json(body: Mapping[str, Any]) -> str:
    """Return a body as ASCII JSON without spaces.

    Non-ASCII characters are escaped, because UTF-8 cannot encode a lone surrogate.
    """
    return json.dumps(body, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
