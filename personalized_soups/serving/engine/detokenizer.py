"""An answer's text while its tokens come: whole characters only, and nothing of what may become a stop string."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no whole character yet.
_HALF = "\ufffd"
# Tokens that are held back for it: more are no character, which has four bytes, whatever follows.
_MOST_HELD = 16
_LONGEST = 4


class Detokenizer:
    """The text of one answer.

    Args:
        tokenizer: of the base.
        stops: strings at which the answer ends; they are not part of it. The one that is complete first counts, of two
            at once the longer one, however the tokens cut them.
        silent: tokens that say nothing, as `silent_tokens` finds them: decoded with the others they would be decoded
            again and again.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), silent: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is known for good ...
        self._before = 0  # ... and from which on they are decoded again: some tokens look at their neighbours
        self._held = ""  # known, and perhaps the beginning of a stop string
        self.is_stopped = False
        self._silent = silent

    def add(self, token: int) -> str:
        """Take the next token, and return what can be told now."""
        if token in self._silent:
            return ""
        self._tokens.append(token)
        old = self._decoded(self._before, self._read)
        new = self._decoded(self._before, len(self._tokens))
        end = len(self._tokens)
        if new.endswith(_HALF):
            if end - self._read <= _MOST_HELD:
                return ""
            end, new = self._settled(new)
        if len(new) <= len(old):
            return ""
        self._before, self._read = self._read, end
        return self._tell(new[len(old) :])

    def end(self) -> str:
        """Return what was held back: no token comes any more."""
        old = self._decoded(self._before, self._read)
        new = self._decoded(self._before, len(self._tokens))
        self._read = len(self._tokens)
        told = self._tell(new[len(old) :])
        if not self.is_stopped:
            told, self._held = told + self._held, ""
        return told

    def _settled(self, whole: str) -> tuple[int, str]:
        """Return at which token, and with which text, what nothing that follows can change ends."""
        for end in range(len(self._tokens) - _LONGEST, self._read, -1):
            first, second = self._decoded(self._before, end), self._decoded(end, len(self._tokens))
            # a character that is cut in two there reads as two halves
            if second and first + second == whole:
                return end, first
        return self._read, ""

    def _tell(self, text: str) -> str:
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)[1]]
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
    """Return the special tokens, which are left out of texts."""
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
