"""Writes answers in the two formats of OpenAI's protocol: chat completions and text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from personalized_soups.serving.engine.token_sampler import TokenLogprobs
from personalized_soups.serving.protocol.pending_answers import Answer, PendingAnswers


class PendingChat(PendingAnswers):
    """Answers to POST /v1/chat/completions."""

    prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the entry of `choices` for a complete answer."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.parts), "refusal": None},
            "logprobs": self.logprobs(answer.logprobs, 0) if self.request.num_logprobs is not None else None,
            "finish_reason": answer.finish,
        }

    def head(self, index: int) -> dict[str, Any] | None:
        """Return the entry of `choices` with the role, which a stream sends before the first token."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return the entry of `choices` that a stream sends for an answer's next piece."""
        delta = {"content": text} if text or finish is None else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]], start: int) -> dict[str, Any]:
        """Return the log-probabilities of tokens in the format of chat completions."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": _bytes(text)}

        content = [
            {**entry(token, logprobs.chosen), "top_logprobs": [entry(*candidate) for candidate in logprobs.top]}
            for token, logprobs in tokens
        ]
        return {"content": content, "refusal": None}


class PendingCompletion(PendingAnswers):
    """Answers to POST /v1/completions."""

    prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return the entry of `choices` for a complete answer."""
        logprobs = self.logprobs(answer.logprobs, 0) if self.request.num_logprobs is not None else None
        return {"index": index, "text": "".join(answer.parts), "logprobs": logprobs, "finish_reason": answer.finish}

    def head(self, index: int) -> dict[str, Any] | None:
        """Return None, because a stream of text completions starts with the text."""
        return None

    def delta(self, index: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Return the entry of `choices` that a stream sends for an answer's next piece."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def logprobs(self, tokens: Sequence[tuple[int, TokenLogprobs]], start: int) -> dict[str, Any]:
        """Return the log-probabilities of tokens, and where the text of each token starts in the answer."""
        texts = [self.token_text(token) for token, _ in tokens]
        offsets = [start + sum(map(len, texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [logprobs.chosen for _, logprobs in tokens],
            "top_logprobs": [
                {self.token_text(token): logprob for token, logprob in logprobs.top} if logprobs.top else None
                for _, logprobs in tokens
            ],
            "text_offset": offsets,
        }


def _bytes(text: str) -> list[int] | None:
    """Return a token's bytes, or None if the token is only part of a character, because its text lacks the bytes."""
    return None if "\ufffd" in text else list(text.encode())
