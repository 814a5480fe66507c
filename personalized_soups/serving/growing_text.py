"""An answer's text while its tokens come: whole characters only, and nothing of what may become a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What stands for bytes that are no whole character yet.
_HALF = "\ufffd"


class GrowingText:
    """The text of one answer.

    Args:
        tokenizer: of the base.
        stops: strings at which the answer ends; they are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._read = 0  # tokens whose text is known for good ...
        self._before = 0  # ... and from which on they are decoded again: some tokens look at their neighbours
        self._held = ""  # known, and perhaps the beginning of a stop string
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take the next token, and return what can be told now."""
        self._tokens.append(token)
        old = self._decoded(self._before, self._read)
        new = self._decoded(self._before, len(self._tokens))
        if len(new) <= len(old) or new.endswith(_HALF):
            return ""
        self._before, self._read = self._read, len(self._tokens)
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

    def _tell(self, text: str) -> str:
        if self.is_stopped:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            self._held = ""
            return text[: min(found)]
        held = max(_overlap(text, stop) for stop in self._stops)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _decoded(self, start: int, stop: int) -> str:
        return str(
            self._tokenizer.decode(
                self._tokens[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are the beginning of a stop string."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
