"""The text of an answer while its tokens arrive: only whole characters, and no text that may start a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What tokenizers decode bytes to that are not a whole character.
_INCOMPLETE = "\ufffd"
# Tokens that may wait for the rest of a character; if more wait, the first ones cannot become a character.
_MAX_PENDING = 16
# Bytes of the longest character in UTF-8, and so the most tokens that it spans.
_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Decodes the tokens of one answer.

    Attributes:
        is_stopped: whether the text contains a stop string.

    Args:
        tokenizer: of the base.
        stops: strings that end the answer and do not belong to it. The string that is complete first counts, and the
            longer one of two that are complete at once, wherever the tokens divide them.
        silent: tokens without text, from `silent_tokens`. They are skipped, because the detokenizer would decode them
            again with every token that follows.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), silent: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is final ...
        self._context = (
            0  # ... and the first of them that is decoded again: a token's text may depend on its neighbours
        )
        self._held = ""  # text that is final, but may be the start of a stop string
        self.is_stopped = False
        self._silent = silent

    def add(self, token: int) -> str:
        """Take the next token, and return the text that has become final."""
        if token in self._silent:
            return ""
        self._tokens.append(token)
        old = self._decoded(self._context, self._read)
        new = self._decoded(self._context, len(self._tokens))
        end = len(self._tokens)
        if new.endswith(_INCOMPLETE):
            if end - self._read <= _MAX_PENDING:
                return ""
            end, new = self._final_part(new)
        if len(new) <= len(old):
            return ""
        self._context, self._read = self._read, end
        return self._until_stop(new[len(old) :])

    def end(self) -> str:
        """Return the text that was held back; no token follows."""
        old = self._decoded(self._context, self._read)
        new = self._decoded(self._context, len(self._tokens))
        self._read = len(self._tokens)
        text = self._until_stop(new[len(old) :])
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _final_part(self, whole: str) -> tuple[int, str]:
        """Return how many tokens, and which text of them, no later token can change."""
        for end in range(len(self._tokens) - _MAX_CHARACTER_BYTES, self._read, -1):
            first, second = self._decoded(self._context, end), self._decoded(end, len(self._tokens))
            # a character that is cut at `end` decodes to two incomplete ones, and the sum differs from the whole
            if second and first + second == whole:
                return end, first
        return self._read, ""

    def _until_stop(self, text: str) -> str:
        """Return the part of a new text that can be delivered, and hold back what may start a stop string."""
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        matches = [(start + len(stop), start) for stop in self._stops if (start := text.find(stop)) >= 0]
        if matches:
            self.is_stopped = True
            self._held = ""
            return text[: min(matches)[1]]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decoded(self, start: int, stop: int) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def silent_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the special tokens, which texts leave out."""
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the start of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
