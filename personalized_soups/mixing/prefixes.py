"""Keys and values of prompts that were read, kept for the next prompt that begins alike and for the same soup.

T tokens.
"""

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
    """The keys and values of a prompt's first `num_tokens` tokens, a copy of the taker's own."""

    num_tokens: int
    past: Any


class PrefixCache:
    """Keeps the latest prompts' keys and values; safe between threads.

    Keys and values depend on the soup that read the tokens: a prompt is found again only under the version (see
    SoupModel.version) with which it was put in, so that other weights, or an expert that was replaced, never see it.

    Args:
        max_bytes: of all keys and values; those that were used longest ago go first.
    """

    def __init__(self, max_bytes: int = 1 << 30) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], tuple[Any, int]] = OrderedDict()
        self._lock = threading.Lock()
        self.num_bytes = 0

    def longest(self, version: str, tokens: Sequence[int]) -> Prefix | None:
        """Return the longest beginning of a prompt that is there, short of its last token; None where none is.

        The last token is always read anew: its logits choose the first token of the answer.
        """
        wanted = tuple(tokens[:-1])
        with self._lock:
            best, shared = None, 0
            for key in self._entries:
                if key[0] == version and (common := _common(key[1], wanted)) > shared:
                    best, shared = key, common
            if best is None:
                return None
            self._entries.move_to_end(best)
            past = copy.deepcopy(self._entries[best][0])
        _cut(past, shared)
        return Prefix(shared, past)

    def put(self, version: str, tokens: Sequence[int], past: Any) -> None:
        """Keep the keys and values of `tokens`: a cache with one row, which is this one's from now on.

        What it holds beyond the tokens is cut off. A cache that keeps a window alone (sliding attention) cannot be cut:
        it is not kept.
        """
        if any(getattr(layer, "is_sliding", False) for layer in past.layers):
            return
        _cut(past, len(tokens))
        for layer in past.layers:
            # what is cut off is no more than out of view, and would stay in memory
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()
        num_bytes = sum(tensor.nbytes for tensor in _tensors(past))
        key = (version, tuple(tokens))
        with self._lock:
            self._forget(key)
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
    """Return an empty cache for a model of transformers."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def _cut(past: Any, num_tokens: int) -> None:
    beyond = past.get_seq_length() - num_tokens
    if beyond > 0:
        past.crop(-beyond)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two prompts begin alike with."""
    for count, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return count
    return min(len(one), len(other))


def _tensors(past: Any) -> list[Tensor]:
    return [tensor for layer in past.layers for tensor in (layer.keys, layer.values) if tensor is not None]
