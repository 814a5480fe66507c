"""Adapters for a base whose input and output embeddings are one tensor (ensure_weight_tying).

PEFT then saves one change twice: for the embedding, and for the output layer with the factors' roles exchanged, as
`(B A)^T = A^T B^T`. Its own merge adds it to the one tensor twice; in training each of the two layers had it once.
"""

from __future__ import annotations

from itertools import permutations

import torch

from personalized_soups.adapters.lora import LoraAdapter


def tied_copies(adapter: LoraAdapter) -> dict[str, str]:
    """Return the changes that repeat another on a tied base, each with the one that it repeats.

    Modules stand by their names, tensors that are trained whole by their names in the file. On a base whose embeddings
    are one tensor a copy is to be left out; on any other base both count. Empty without ensure_weight_tying.

    Raises:
        InputError: if a value is NaN or infinite.
    """
    if not adapter.config.ensure_weight_tying:
        return {}
    found = {}
    modules = adapter.modules.values()
    for embedding in (module for module in modules if module.kind == "embedding"):
        for other in (module for module in modules if module.kind in {"linear", "transposed"}):
            if (other.out_features, other.in_features) == (embedding.in_features, embedding.out_features):
                first, second = adapter.factors(embedding.name), adapter.factors(other.name)
                if torch.equal(second.a_RI, first.b_OR.T) and torch.equal(second.b_OR, first.a_RI.T):
                    found[other.name] = embedding.name
    # PEFT ties the rest to the input embedding, so what sorts last (model.embed_tokens after lm_head) is no copy
    whole = [each for each in adapter.trained.values() if each.kind == "replaced" and len(each.shape) == 2]
    for copy, kept in permutations(whole, 2):
        is_repeat = copy.target < kept.target and copy.shape == kept.shape
        if is_repeat and torch.equal(adapter.trained_tensor(copy.name), adapter.trained_tensor(kept.name)):
            found[copy.name] = kept.name
    return found


def are_tied_tokens(of_input: tuple[int, ...] | None, of_output: tuple[int, ...] | None) -> bool:
    """Return whether tokens that were trained in the input embedding are those of the output embedding, too.

    On a base whose configuration ties the two. Tokens of the output embedding alone, or others than the input's, are
    its own: the two embeddings are then no longer alike. Source: peft.utils.other.set_additional_trainable_modules.

    Args:
        of_input: the tokens that one adapter trained in the input embedding, in its order; None where it trained none.
        of_output: those of the output embedding.
    """
    return of_input is not None and of_output in (None, of_input)
