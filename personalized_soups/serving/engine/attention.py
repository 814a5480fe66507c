"""Checks whether a model supports continuous batching.

The model's attention must accept a separate mask for each row of a batch, and keep the keys and values of every token.
"""

from __future__ import annotations

from typing import Any

from personalized_soups.errors import UsageError

_KNOWN_LAYERS = {"full_attention", "sliding_attention"}
# These implementations accept a separate mask for each row. Flash attention accepts no mask.
_KNOWN_IMPLEMENTATIONS = {"sdpa", "eager"}

_FIX = "serve a model with full or sliding attention, or generate in fixed batches with psoups generate"


def layer_kinds(text: Any) -> tuple[str, ...]:
    """Return the kinds of attention that a model's layers use, in alphabetical order.

    Args:
        text: the configuration of the model's decoder.

    Raises:
        UsageError: if a layer, such as a recurrent layer, does not keep the keys and values of every token.
    """
    kinds = getattr(text, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if getattr(text, "sliding_window", None) else "full_attention"]
    unknown = sorted(set(kinds) - _KNOWN_LAYERS)
    if unknown:
        raise UsageError(
            f"the model has layers of type {', '.join(unknown)}, but continuous batching supports only layers of type "
            f"{' and '.join(sorted(_KNOWN_LAYERS))}",
            where="base",
            mend=_FIX,
        )
    return tuple(sorted(set(kinds)))


def check_attention(text: Any) -> None:
    """Check that a model's attention respects the mask and the positions of each row.

    Args:
        text: the configuration of the model's decoder.

    Raises:
        UsageError: if the attention does not respect them. The message names the kind of attention.
    """
    implementation = text._attn_implementation
    if implementation not in _KNOWN_IMPLEMENTATIONS:
        raise UsageError(
            f"the model uses the attention implementation {implementation!r}, which accepts no separate mask "
            "for each row of a batch",
            where="base",
            mend="load the model with attn_implementation='sdpa'",
        )
    # GPT-Neo counts the window of its local layers in columns of the batch, which include padding
    if "local" in (getattr(text, "attention_layers", None) or ()):
        raise UsageError(
            "the model has layers with local attention, but continuous batching supports only full and sliding "
            "attention",
            where="base",
            mend=_FIX,
        )


def rows_differ(model: Any) -> UsageError:
    """Return the error for a model that computes other logits for a prompt in a batch than for a prompt alone."""
    return UsageError(
        f"{type(model).__name__} does not compute the same logits for a prompt in a batch as for a prompt alone",
        where="base",
        mend=_FIX,
    )
