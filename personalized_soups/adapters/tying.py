"""Adapters that PEFT trained with ensure_weight_tying, for a base whose input and output embeddings are one tensor.

PEFT saves such a delta twice: once for the embedding, and once for the output layer with A and B exchanged, because
`(B A)^T = A^T B^T`. PEFT's merge adds both copies to the tied tensor, but each of the two layers had only one delta
during training.
"""

from __future__ import annotations

from itertools import permutations

import torch

from personalized_soups.adapters.lora import LoraAdapter


def tied_copies(adapter: LoraAdapter) -> dict[str, str]:
    """Return a mapping from each copy to its original; empty if ensure_weight_tying is off.

    A LoRA module is given by its name. A tensor that is trained as a whole is given by its name in the file. If the
    base's embeddings are one tensor, the caller must skip the copies. Otherwise, both copy and original count.

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

    They do unless the output embedding has other trained tokens. In that case, the embeddings are no longer equal.
    Source: peft.utils.other.set_additional_trainable_modules.

    Args:
        of_input: the tokens that the adapter trained in the input embedding, in the order of the file, or None.
        of_output: the tokens that the adapter trained in the output embedding, in the order of the file, or None.
    """
    return of_input is not None and of_output in (None, of_input)
