"""The input and output embeddings of a base model. They are one tensor if the model ties them."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from personalized_soups.adapters.names import core_name
from personalized_soups.adapters.tie_flag import says_tied
from personalized_soups.files.shards import Checkpoint

# The last steps of the names of a causal model's input and output embeddings, which transformers may tie.
_INPUTS = ("embed_tokens", "wte", "word_embeddings", "embed_in", "tok_embeddings")
_OUTPUTS = ("lm_head", "embed_out", "output")


class Embeddings:
    """The embeddings in a base model's files.

    Args:
        config: the contents of config.json.
        checkpoint: the weight files.
    """

    def __init__(self, config: Mapping[str, Any], checkpoint: Checkpoint) -> None:
        self._config = config
        self._checkpoint = checkpoint

    @cached_property
    def tied(self) -> tuple[str, str] | None:
        """The names of the input and the output embedding if they are tied, else None.

        The files have the tensor under the name of the input embedding.
        """
        inputs, outputs = self._names
        if len(inputs) != 1 or not self._says_tied:
            return None
        # an output embedding of another shape is a separate tensor, regardless of the configuration
        same = [name for name in outputs if self._shape(name) == self._shape(inputs[0])]
        if outputs and not same:
            return None
        return inputs[0], same[0] if same else f"{_head_of(inputs[0])}.weight"

    @cached_property
    def output_for_both(self) -> str | None:
        """The name of the output embedding if it is tied and the files have no input embedding, else None."""
        inputs, outputs = self._names
        return outputs[0] if not inputs and len(outputs) == 1 and self._says_tied else None

    def is_missing_output(self, tensor: str) -> bool:
        """Return whether `tensor` is the output embedding of a tied model that is not in the files."""
        is_head = core_name(tensor).removesuffix(".weight") in _OUTPUTS
        return is_head and self.tied is not None and self.tied[1] not in self._checkpoint

    @property
    def _is_causal(self) -> bool:
        return any("LM" in str(name) for name in self._config.get("architectures") or ())

    @property
    def _names(self) -> tuple[list[str], list[str]]:
        inputs = [name for name in self._checkpoint if is_input_embedding(name) and len(self._shape(name)) == 2]
        return inputs, [name for name in self._checkpoint if _module(name) in _OUTPUTS]

    @cached_property
    def _says_tied(self) -> bool:
        says = says_tied(self._config)
        # the configuration does not say: a causal model without an output embedding in its files is tied
        return not self._names[1] and self._is_causal if says is None else says

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._checkpoint.entry(name).shape


def is_input_embedding(tensor: str) -> bool:
    """Return whether a tensor's name is that of an input embedding."""
    return _module(tensor) in _INPUTS


def _module(tensor: str) -> str:
    return tensor.removesuffix(".weight").rpartition(".")[2]


def _head_of(embedding: str) -> str:
    return "embed_out" if _module(embedding) == "embed_in" else "lm_head"
