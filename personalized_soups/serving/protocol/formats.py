"""How answers are written: as chat completions, and as plain completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from personalized_soups.serving.engine.token_sampler import TokenLogprobs
from personalized_soups.serving.protocol.answers import Answer, PendingAnswers


class PendingChat(PendingAnswers):
    """Answers to POST /v1/chat/completions."""

    prefix: ClassVar[str] = "chatcmpl-"
    whole: ClassVar[str] = "chat.completion"
    chunk: ClassVar[str] = "chat.completion.chunk"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a whole answer as the protocol writes it."""
        return {
            "index": index,
            "message": {"role": "assistant", "content": "".join(answer.parts), "refusal": None},
            "logprobs": self.logprobs(answer.logprobs, 0) if self.request.num_logprobs is not None else None,
            "finish_reason": answer.finish,
        }

    def head(self, index: int) -> dict[str, Any] | None:
        """Return the role, which a stream says first."""
        return {
            "index": index,
            "delta": {"role": "assistant", "content": ""},
            "logprobs": None,
            "finish_reason": None,
        }

    def delta(self, index: int, text: str, likely: Any, finish: str | None) -> dict[str, Any]:
        """Return what a stream says of an answer's next part."""
        delta = {"content": text} if text or finish is None else {}
        return {"index": index, "delta": delta, "logprobs": likely, "finish_reason": finish}

    def logprobs(self, likely: Sequence[tuple[int, TokenLogprobs]], start: int) -> dict[str, Any]:
        """Return tokens' log-probabilities as the protocol writes them."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = self.token_text(token)
            return {"token": text, "logprob": logprob, "bytes": _bytes(text)}

        content = [
            {**entry(token, each.chosen), "top_logprobs": [entry(*other) for other in each.top]}
            for token, each in likely
        ]
        return {"content": content, "refusal": None}


class PendingCompletion(PendingAnswers):
    """Answers to POST /v1/completions."""

    prefix: ClassVar[str] = "cmpl-"
    whole: ClassVar[str] = "text_completion"
    chunk: ClassVar[str] = "text_completion"

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return a whole answer as the protocol writes it."""
        likely = self.logprobs(answer.logprobs, 0) if self.request.num_logprobs is not None else None
        return {"index": index, "text": "".join(answer.parts), "logprobs": likely, "finish_reason": answer.finish}

    def head(self, index: int) -> dict[str, Any] | None:
        """Return None: a stream begins with the text."""
        return None

    def delta(self, index: int, text: str, likely: Any, finish: str | None) -> dict[str, Any]:
        """Return what a stream says of an answer's next part."""
        return {"index": index, "text": text, "logprobs": likely, "finish_reason": finish}

    def logprobs(self, likely: Sequence[tuple[int, TokenLogprobs]], start: int) -> dict[str, Any]:
        """Return tokens' log-probabilities as the protocol writes them; `start` is where their text begins."""
        texts = [self.token_text(token) for token, _ in likely]
        offsets = [start + sum(map(len, texts[:place])) for place in range(len(texts))]
        return {
            "tokens": texts,
            "token_logprobs": [each.chosen for _, each in likely],
            "top_logprobs": [
                {self.token_text(token): logprob for token, logprob in each.top} if each.top else None
                for _, each in likely
            ],
            "text_offset": offsets,
        }


def _bytes(text: str) -> list[int] | None:
    """Return a token's bytes; None where it is a part of a character, which its text doesn't tell."""
    return None if "\ufffd" in text else list(text.encode())
