"""A hook that runs before each forward pass of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from personalized_soups.mixing.layers.gates import Gates


class ForwardWatch:
    """Counts the tokens of each batch, and detects that the model was moved or cast while weights are set.

    Attributes:
        when_moved: the function that is called before a forward pass if weights are set, and the layers were moved or
            cast after the weights were set.

    Args:
        model: a model of transformers.
        gates: the gates of the model.
        is_fitting: a function that returns whether the gates have the dtype and device of the layers.
    """

    def __init__(self, model: Any, gates: Gates, is_fitting: Callable[[], bool]) -> None:
        self.when_moved: Callable[[], None] = gates.clear
        self._model = model
        self._gates = gates
        self._is_fitting = is_fitting
        self._hook: RemovableHandle | None = None

    def set(self, is_on: bool) -> None:
        """Register the hook if `is_on` is true, else remove the hook."""
        if is_on and self._hook is None:
            self._hook = self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True)
        elif not is_on and self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _before_forward(self, _model: nn.Module, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        # While compiling, the hook does nothing: otherwise the compiled code would depend on the number of tokens.
        if torch.compiler.is_compiling():
            return
        self._gates.clear()  # a forward pass that failed may have left a held product
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        if ids is not None:
            self._gates.num_tokens = ids.numel()
        elif (embedded := keywords.get("inputs_embeds")) is not None:
            self._gates.num_tokens = embedded.shape[:-1].numel()
        if self._gates.is_on and not self._is_fitting():
            self.when_moved()
