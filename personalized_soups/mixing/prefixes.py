"""A cache of prompts' keys and values, for later prompts that begin with the same tokens and have the same soup."""

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
        num_tokens: the number of tokens of this beginning.
        past: the keys and values of these tokens, as a cache object of transformers. The object is a copy, which the
            caller may extend.
    """

    num_tokens: int
    past: Any


class PrefixCache:
    """Keeps the keys and values of recent prompts. Several threads may use one cache.

    Keys and values depend on the soup with which they were computed. So a prompt is stored under its soup's key
    (`SoupModel.cache_key`). The key changes if the weights change or an expert is replaced, so old keys and values are
    never found again.

    Args:
        max_bytes: the maximum size of all keys and values in bytes. The prompts that were used longest ago are dropped
            first.

    Attributes:
        num_bytes: the size of all keys and values in bytes.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> cache = PrefixCache()
        >>> pieces = list(model.stream("How do I clean a lamp?", {"friendly": 0.5}, max_new_tokens=4, prefixes=cache))
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self._max_bytes = max_bytes
        # Ordered by last use, the oldest first. The keys hold all tokens, so hash collisions do no harm.
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def longest(self, soup: str, tokens: Sequence[int]) -> Prefix | None:
        """Return the longest beginning of a prompt that is cached for its soup; None if no beginning is cached.

        The result never contains the prompt's last token, because the logits of that token are needed to choose the
        answer's first token.

        Args:
            soup: the key of the soup.
            tokens: the tokens of the prompt.
        """
        # The lock is held while prompts are compared and the cache is copied, not during the model's forward pass.
        beginning = tuple(tokens[:-1])
        with self._lock:
            best, shared = None, 0
            for key in self._entries:
                if key[0] == soup and (common := _num_common(key[1], beginning)) > shared:
                    best, shared = key, common
            if best is None:
                return None
            self._entries.move_to_end(best)
            # The answer extends the copy, and other answers may start from the same prefix.
            past = copy.deepcopy(self._entries[best][0])
        # Attention is causal: the keys of the common beginning do not depend on the tokens that are cut off.
        _cut(past, shared)
        return Prefix(shared, past)

    def put(self, soup: str, tokens: Sequence[int], past: Any) -> None:
        """Store the keys and values of a prompt.

        Keys and values beyond the prompt are cut off. Nothing is stored for a model with sliding attention, whose cache
        keeps only the last tokens and cannot be cut.

        Args:
            soup: the key of the soup.
            tokens: the tokens of the prompt.
            past: a cache object of transformers with one row. The caller must not use the object after this call.
        """
        if any(getattr(layer, "is_sliding", False) for layer in past.layers):
            return
        _cut(past, len(tokens))
        for layer in past.layers:
            # `crop` makes views. Only a copy frees the memory of the tokens beyond the prompt.
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        num_bytes = sum(tensor.nbytes for tensor in _tensors(past))
        key = (soup, tuple(tokens))
        with self._lock:
            self._forget(key)
            # Storing a prompt that is larger than `max_bytes` would drop all prompts, also this one.
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
    """Return an empty cache object of transformers for a model's keys and values."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _cut(past: Any, num_tokens: int) -> None:
    beyond = past.get_seq_length() - num_tokens
    # `crop` with a negative number removes that many tokens at the end.
    if beyond > 0:
        past.crop(-beyond)


def _num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many tokens at the beginning of two prompts are equal."""
    for count, (left, right) in enumerate(zip(first, second, strict=False)):
        if left != right:
            return count
    return min(len(first), len(second))


def _tensors(past: Any) -> list[Tensor]:
    return [tensor for layer in past.layers for tensor in (layer.keys, layer.values) if tensor is not None]
