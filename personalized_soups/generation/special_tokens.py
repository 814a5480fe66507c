"""Look up special token ids: the ids that end an answer, and the id that pads shorter rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stop_ids(model: Any, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of the end tokens, which the tokenizer and the model's generation config declare."""
    declared = getattr(model.generation_config, "eos_token_id", None)
    listed = declared if isinstance(declared, list) else [] if declared is None else [declared]
    return frozenset({int(tokenizer.eos_token_id), *map(int, listed)})


def num_embeddings(model: Any) -> int | None:
    """Return the number of tokens for which the model has an embedding, or None if it is unknown."""
    embedding = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embedding, "weight", None)
    return None if weight is None or weight.ndim != 2 else int(weight.shape[0])


def pad_id(tokenizer: PreTrainedTokenizerBase, num_embeddings: int | None) -> int:
    """Return the id that pads shorter rows: the tokenizer's padding id if the base has an embedding for it, else 0.

    A padding token is often added to the tokenizer but not to the base. Padded places are masked, so any id works.
    """
    own = int(tokenizer.pad_token_id)
    return own if num_embeddings is None or own < num_embeddings else 0
