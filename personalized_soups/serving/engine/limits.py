"""How much a batcher does at once, and how long a model's rows may be. Importing this file loads no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a batcher does at once.

    Attributes:
        max_rows: answers generated at once, in one batch.
        max_waiting: requests that may wait for a free row; the queue rejects more.
        max_context: tokens of a prompt and its answer together.
        read_tokens: prompt tokens read between two decoding steps. A higher number shortens the wait for a first token
            and delays the running answers more.
        cache_bytes: bytes of keys and values; None for no limit.

    Raises:
        ValueError: if `max_rows`, `max_context` or `read_tokens` is below 1.
    """

    max_rows: int = 64
    max_waiting: int = 1024
    max_context: int = 4096
    read_tokens: int = 4096
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_context", "read_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")


def max_context_of(config: Any) -> int:
    """Return how many tokens a row of a model may have without changing the other rows of its batch.

    Args:
        config: the model's, as transformers has it.
    """
    text = config.get_text_config(decoder=True)
    ropes: Any = getattr(text, "rope_parameters", None) or {}
    bounds = [
        getattr(text, "max_position_embeddings", None),
        # a row longer than this switches the rotation of every row in the batch, including short ones
        *(
            rope.get("original_max_position_embeddings")
            for rope in (ropes, *ropes.values())
            if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
        ),
    ]
    return min((bound for bound in bounds if isinstance(bound, int)), default=sys.maxsize)
