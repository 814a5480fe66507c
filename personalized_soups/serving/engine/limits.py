"""Limits of the batcher and of the model's context. Importing this module does not import torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of a batcher.

    Attributes:
        max_rows: maximum number of answers that are generated at once, in one batch.
        max_waiting: maximum number of requests that wait for a free row. Further requests are rejected.
        max_context: maximum number of tokens of a prompt and its answer together.
        read_tokens: maximum number of prompt tokens that are read between two decoding steps. With a higher number, new
            answers start earlier, but running answers are delayed longer.
        cache_bytes: maximum size of all keys and values in bytes; None for no limit.

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
    """Return the maximum number of tokens of a row that the model supports in a batch.

    The number is `sys.maxsize` if the configuration gives no maximum.

    Args:
        config: the model's configuration, from transformers.
    """
    text = config.get_text_config(decoder=True)
    ropes: Any = getattr(text, "rope_parameters", None) or {}
    bounds = [
        getattr(text, "max_position_embeddings", None),
        # a longer row would change the rotary embedding of all rows in the batch, including short rows
        *(
            rope.get("original_max_position_embeddings")
            for rope in (ropes, *ropes.values())
            if isinstance(rope, Mapping) and rope.get("rope_type") == "longrope"
        ),
    ]
    return min((bound for bound in bounds if isinstance(bound, int)), default=sys.maxsize)
