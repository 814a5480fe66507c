"""A cache of prompts' keys and values, for later prompts that begin alike and have the same soup."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False, slots=True)
class Prefix:
    """The beginning of a prompt.

    Attributes:
        num_tokens: how many of the prompt's first tokens it covers.
        past: their keys and values, a cache of transformers. It is a copy, which the caller may extend.
    """

    num_tokens: int
    past: Any


class PrefixCache:
    """Keeps the keys and values of recent prompts. Safe for use by several threads.

    Keys and values depend on the soup that read the tokens. So a prompt is stored under the soup's key
    (`SoupModel.cache_key`): other weights, or an expert that was replaced, have other keys and never find it.

    Args:
        max_bytes: the most bytes of all keys and values. The prompts used longest ago are dropped first.

    Attributes:
        num_bytes: the bytes of all keys and values.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> cache = PrefixCache()
        >>> pieces = list(model.stream("How do I clean a lamp?", {"friendly": 0.5}, max_new_tokens=4, prefixes=cache))
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self._max_bytes = max_bytes
        # Ordered by use, the oldest first. The keys hold all tokens, so equal hashes of other prompts do no harm.
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def longest(self, soup: str, tokens: Sequence[int]) -> Prefix | None:
        """Return the longest cached beginning of a prompt, without the prompt's last token; None if there is none.

        The last token is always computed again: its logits choose the first token of the answer.

        Args:
            soup: the key of the soup.
            tokens: of the prompt.
        """
        # The lock is held for the comparison and the copy, not for the model's forward pass.
        beginning = tuple(tokens[:-1])
        with self._lock:
            best, shared = None, 0
            for key in self._entries:
                if key[0] == soup and (common := _num_common(key[1], beginning)) > shared:
                    best, shared = key, common
            if best is None:
                return None
            self._entries.move_to_end(best)
            # A copy, because the answer extends it, and other answers may start from the same prefix.
            past = copy.deepcopy(self._entries[best][0])
        # A shorter common beginning is useful, too: attention is causal, so later tokens never change earlier keys.
        _cut(past, shared)
        return Prefix(shared, past)

    def put(self, soup: str, tokens: Sequence[int], past: Any) -> None:
        """Store the keys and values of a prompt.

        Keys and values beyond the prompt are cut off. A cache with sliding attention keeps only a window, cannot be
        cut, and is not stored.

        Args:
            soup: the key of the soup.
            tokens: of the prompt.
            past: a cache of transformers with one row, which the caller must not use any more.
        """
        if any(getattr(layer, "is_sliding", False) for layer in past.layers):
            return
        _cut(past, len(tokens))
        for layer in past.layers:
            # `crop` makes views; only a copy frees the memory beyond the prompt.
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        num_bytes = sum(tensor.nbytes for tensor in _tensors(past))
        key = (soup, tuple(tokens))
        with self._lock:
            self._forget(key)
            # A prompt larger than the whole cache would drop all others and then itself.
            if num_bytes > self._max_bytes:
                return
            self._entries[key] = (past, num_bytes)
            self.num_bytes += num_bytes
            while self.num_bytes > self._max_bytes:
                self._forget(next(iter(self._entries)))

    def _forget(self, key: tuple[str, tuple[int, ...]]) -> None:
        if key in self._entries:
            self.num_bytes -= self._entries.pop(key)[1]


def new_past(model: Any) -> Any:
    """Return an empty cache of keys and values for a model of transformers."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _cut(past: Any, num_tokens: int) -> None:
    beyond = past.get_seq_length() - num_tokens
    # A negative number removes that many tokens at the end.
    if beyond > 0:
        past.crop(-beyond)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return the number of tokens at the beginning that two prompts share."""
    for count, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return count
    return min(len(first), len(second))


def _tensors(past: Any) -> list[Tensor]:
    return [tensor for layer in past.layers for tensor in (layer.keys, layer.values) if tensor is not None]
