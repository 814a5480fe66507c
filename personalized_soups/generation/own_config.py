"""Keep a model's own generation config from changing how we generate."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class OwnGenerationConfig:
    """The generation config of a model and, if PEFT wraps it, that of the wrapped model.

    transformers merges a model's own config into the config of a call. The model's config may set sampling, penalties
    or a maximum length.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._num_blocks = 0
        self._configs: list[tuple[Any, Any]] = []

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Replace the config by an empty config while the block runs.

        Several threads may run such blocks at once. The last thread that leaves its block restores the config.
        """
        with self._lock:
            if self._num_blocks == 0:
                self._configs = _replace_by_empty(self._model)
            self._num_blocks += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_blocks -= 1
                if self._num_blocks == 0:
                    for part, config in self._configs:
                        part.generation_config = config


def _replace_by_empty(model: Any) -> list[tuple[Any, Any]]:
    """Give `model` and the models inside it an empty generation config. Return each model with its old config."""
    from transformers import GenerationConfig

    wrapped = model.get_base_model() if hasattr(model, "get_base_model") else model
    parts = {id(part): part for part in (model, getattr(model, "base_model", model), wrapped)}.values()
    own = [(part, part.generation_config) for part in parts if getattr(part, "generation_config", None) is not None]
    for part, _ in own:
        part.generation_config = GenerationConfig()
    return own
