"""Adapters for a base whose input and output embeddings are one tensor (ensure_weight_tying).

PEFT then saves the same change twice: for the embedding, and for the output layer with A and B exchanged, since
`(B A)^T = A^T B^T`. PEFT's merge adds both to the tied tensor, but in training each of the two layers had one.
"""

from __future__ import annotations

from itertools import permutations

import torch

from personalized_soups.adapters.lora import LoraAdapter


def tied_copies(adapter: LoraAdapter) -> dict[str, str]:
    """Return the changes that repeat another change on a tied base, each with the repeated one.

    Low-rank changes are given by module name, tensors that are trained whole by their names in the file. If the base's
    embeddings are one tensor, skip the copies; otherwise both changes count. Empty without ensure_weight_tying.

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
    # PEFT copies the input embedding's tensor, whose name sorts last (model.embed_tokens after lm_head)
    whole = [each for each in adapter.trained.values() if each.kind == "replaced" and len(each.shape) == 2]
    for copy, kept in permutations(whole, 2):
        is_repeat = copy.target < kept.target and copy.shape == kept.shape
        if is_repeat and torch.equal(adapter.trained_tensor(copy.name), adapter.trained_tensor(kept.name)):
            found[copy.name] = kept.name
    return found


def are_tied_tokens(of_input: tuple[int, ...] | None, of_output: tuple[int, ...] | None) -> bool:
    """Return whether the trained tokens of the input embedding also count for the tied output embedding.

    They do unless the output embedding has trained tokens of its own that differ; the embeddings are then no longer
    equal. Source: peft.utils.other.set_additional_trainable_modules.

    Args:
        of_input: the tokens that an adapter trained in the input embedding, in its order, or None.
        of_output: the tokens that it trained in the output embedding, or None.
    """
    return of_input is not None and of_output in (None, of_input)
