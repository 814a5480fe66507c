"""Streams answers to the client as server-sent events while they are generated."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.pending_answers import Answer, PendingAnswers, to_json
from personalized_soups.serving.protocol.piece_queue import ClientDisconnectedError

_DONE = b"data: [DONE]\n\n"


class EventStream(Response):
    """A response that sends each piece of the answers as a server-sent event.

    Args:
        pending: the submitted request, whose answers are sent.
        receive: the ASGI function that returns the client's next message. The request's body must have been received.
    """

    media_type = "text/event-stream"

    def __init__(self, pending: PendingAnswers, receive: Receive) -> None:
        # nginx would collect the events without X-Accel-Buffering
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._pending = pending
        self._receive = receive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events.

        An error after the first event is sent as an event.

        Raises:
            ApiError: if an answer fails before the first event. The server then sends a response with the error's
                status.
        """
        is_begun = False
        try:
            async with aclosing(self._events()) as events:
                async for event in events:
                    if not is_begun:
                        is_begun = True
                        await send(
                            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                        )
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except (ClientDisconnectedError, OSError):
            return
        except ApiError as error:
            if not is_begun:
                raise
            await send({"type": "http.response.body", "body": _event(error.body()), "more_body": True})
        await send({"type": "http.response.body", "body": _DONE, "more_body": False})

    async def _events(self) -> AsyncGenerator[bytes]:
        pending = self._pending
        envelope = pending.envelope(pending.chunk, pending.prefix + secrets.token_hex(12))
        frame = _Frame(envelope, with_usage=pending.request.includes_usage)
        answers = [Answer() for _ in pending.generations]
        # for each answer, the number of characters of its tokens; the detokenizer may not have sent all of them yet
        lengths = [0] * len(answers)
        async with aclosing(pending.pieces(self._receive)) as source:
            async for pieces in source:
                events = b""
                for index, piece in pieces:
                    answer = answers[index]
                    if not answer.num_tokens and (head := pending.head(index)) is not None:
                        events += frame.around(head)
                    answer.num_tokens += 1
                    tokens = pending.logprobs_of(piece)
                    logprobs = pending.logprobs(tokens, lengths[index]) if tokens else None
                    lengths[index] += sum(len(pending.token_text(token)) for token, _ in tokens)
                    if piece.text or piece.finish is not None or logprobs is not None:
                        events += frame.around(pending.delta(index, piece.text, logprobs, piece.finish))
                if events:
                    yield events
        if pending.request.includes_usage:
            usage = pending.usage(sum(answer.num_tokens for answer in answers))
            yield _event({**envelope, "choices": [], "usage": usage})


class _Frame:
    """Writes events that differ only in `choices`. The JSON around `choices` is encoded once."""

    def __init__(self, envelope: Mapping[str, Any], *, with_usage: bool) -> None:
        self._before = f'data: {to_json(envelope)[:-1]},"choices":['.encode()
        self._after = b'],"usage":null}\n\n' if with_usage else b"]}\n\n"

    def around(self, choice: Mapping[str, Any]) -> bytes:
        return self._before + to_json(choice).encode() + self._after


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + to_json(body).encode() + b"\n\n"
