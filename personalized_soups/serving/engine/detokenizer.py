"""`Detokenizer`: decodes the tokens of an answer one by one.

It returns only whole characters, and holds back text that may be the start of a stop string.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokenizers decode the bytes of an incomplete character to this character.
_INCOMPLETE = "\ufffd"
# Maximum number of tokens that wait for the rest of a character. If more wait, their first bytes are invalid.
_MAX_PENDING = 16
# Maximum number of bytes of a character in UTF-8. A character cannot span more tokens than that.
_MAX_CHARACTER_BYTES = 4


class Detokenizer:
    """Decodes the tokens of one answer.

    Attributes:
        is_stopped: whether the text contains a stop string.

    Args:
        tokenizer: the base's tokenizer.
        stops: stop strings. The first stop string in the text ends the answer and is removed from the text. If the text
            contains several, the string that ends first counts; of two strings with the same end, the longer one.
        silent: the special tokens, from `silent_tokens`. They have no text and are skipped, because they would
            otherwise be decoded again with every following token.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), silent: Collection[int] = ()
    ) -> None:
        self._tokenizer = tokenizer
        self._stops = tuple(stop for stop in stops if stop)
        self._tokens: list[int] = []
        self._read = 0  # number of tokens whose text is final
        # The tokens from this index on are decoded again with new tokens, because a token's text may depend on its
        # neighbors.
        self._context = 0
        self._held = ""  # text that is final, but may be the start of a stop string
        self.is_stopped = False
        self._silent = silent

    def add(self, token: int) -> str:
        """Append a token, and return the text that has become final."""
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
        """Return the text that was held back. Call this after the last token."""
        old = self._decoded(self._context, self._read)
        new = self._decoded(self._context, len(self._tokens))
        self._read = len(self._tokens)
        text = self._until_stop(new[len(old) :])
        if not self.is_stopped:
            text, self._held = text + self._held, ""
        return text

    def _final_part(self, whole: str) -> tuple[int, str]:
        """Return the index up to which the tokens' text is final, and the text from `_context` to this index."""
        for end in range(len(self._tokens) - _MAX_CHARACTER_BYTES, self._read, -1):
            first, second = self._decoded(self._context, end), self._decoded(end, len(self._tokens))
            # if `end` cuts a character, both parts decode to incomplete characters, and their sum differs from `whole`
            if second and first + second == whole:
                return end, first
        return self._read, ""

    def _until_stop(self, text: str) -> str:
        """Return the new text up to a stop string, and hold back the end that may be the start of a stop string."""
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
    """Return the ids of the special tokens, which have no text in answers."""
    return frozenset(number for number, token in tokenizer.added_tokens_decoder.items() if token.special)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is an incomplete start of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
