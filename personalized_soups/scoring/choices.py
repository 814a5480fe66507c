"""The log-probabilities of short answers, such as Yes and No, as the first token that a model generates.

Shapes: N = prompts, C = choices, B = rows of a batch, T = tokens of the longest row, V = vocabulary size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from personalized_soups.errors import InputError, UsageError
from personalized_soups.generation.prompts import Prompt
from personalized_soups.generation.sampling import pad_left
from personalized_soups.mixing.prefixes import new_past

if TYPE_CHECKING:
    from torch import Tensor

    from personalized_soups.declare.expert_weights import ProfileLike
    from personalized_soups.mixing.model import SoupModel

Floats = npt.NDArray[np.float64]


def choice_log_probs(
    model: SoupModel,
    prompts: Sequence[Prompt],
    choices: Sequence[str],
    profile: ProfileLike = None,
    *,
    batch_size: int = 64,
    on_done: Callable[[int], None] | None = None,
) -> Floats:
    """Return [N, C], float64: the log-probability of each choice as the first token of the answer to each prompt.

    The tokens with which all prompts begin, such as a chat template's system message, are computed once. Logits are
    those of the model's dtype, and log-probabilities are computed from them in float32.

    Args:
        model: the base with its experts. It needs a tokenizer.
        prompts: texts or chats.
        choices: texts that are one token each.
        profile: the weights of the experts, as for `SoupModel.mixture`. None is the base alone.
        batch_size: the maximum number of prompts in a forward pass.
        on_done: called after each batch with the number of prompts that are finished.

    Raises:
        InputError: if a prompt is rejected by `Generator.encoded`, or a choice is not one token.
        UsageError: if there are no choices, or `batch_size` is less than 1.

    Example:
        >>> model = SoupModel.from_pretrained(TINY_BASE, "experts", device="cpu")
        >>> choice_log_probs(model, ["How do I clean a lamp?"], ["D", "W"], {"friendly": 1.0}).shape
        (1, 2)
    """
    if not choices:
        raise UsageError("there are no choices", where="choices", mend='give texts, such as choices=["Yes", "No"]')
    if batch_size < 1:
        raise UsageError(
            f"batch_size is {batch_size}, but must be at least 1", where="batch_size", mend="give batch_size=64"
        )
    tokens = [_only_token(model, choice) for choice in choices]
    encoded = [model.generator.encoded(prompt) for prompt in prompts]
    num_shared = _num_shared(encoded)
    # Prompts of similar length share a batch, so that a batch has little padding.
    order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    table = np.zeros((len(encoded), len(choices)))
    with torch.no_grad(), model.mixture(profile):
        past = _past_of(model, encoded[0][:num_shared]) if num_shared else None
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            suffixes = [encoded[row][num_shared if past is not None else 0 :] for row in rows]
            logits_BV = _next_logits(model, suffixes, past)
            log_probs_BC = logits_BV[:, tokens].float() - logits_BV.float().logsumexp(-1, keepdim=True)
            table[rows] = log_probs_BC.cpu().double().numpy()
            if on_done is not None:
                on_done(start + len(rows))
    return table


def _only_token(model: SoupModel, choice: str) -> int:
    ids = list(model.generator.tokenizer(choice, add_special_tokens=False)["input_ids"])
    if len(ids) != 1:
        raise InputError(
            f"the choice {choice!r} has {len(ids)} tokens, but must be one token of the base",
            where="choices",
            mend="choose words that are one token each, such as Yes and No",
        )
    return int(ids[0])


def _num_shared(encoded: Sequence[list[int]]) -> int:
    """Return the number of tokens with which all prompts begin, and leave each prompt at least one token."""
    if not encoded:
        return 0
    first, last = min(encoded), max(encoded)
    most = min(map(len, encoded)) - 1
    return next((at for at in range(most) if first[at] != last[at]), most)


def _past_of(model: SoupModel, tokens: Sequence[int]) -> Any:
    """Return the keys and values of the shared tokens, or None for a cache that cannot be repeated."""
    past = new_past(model.model)
    if any(getattr(layer, "is_sliding", False) for layer in past.layers):
        return None
    ids_1T = torch.tensor([list(tokens)], device=model.model.device)
    return model.model(input_ids=ids_1T, past_key_values=past, use_cache=True, **_kept(model, 1)).past_key_values


def _next_logits(model: SoupModel, rows: list[list[int]], past: Any) -> Tensor:
    """Return [B, V]: the logits of the token after each row. `past` holds the keys and values before every row."""
    device = model.model.device
    ids_BT, mask_BT = pad_left(rows, model.generator.pad_id, device)
    num_past = 0
    inputs: dict[str, Any] = {"use_cache": False}
    if past is not None:
        num_past = past.get_seq_length()
        inputs = {"use_cache": True, "past_key_values": _repeated(model, past, len(rows))}
    positions_BT = num_past + (mask_BT.cumsum(-1) - 1).clamp(min=0)
    if "position_ids" in inspect.signature(model.model.forward).parameters:
        inputs["position_ids"] = positions_BT
    full_mask = torch.cat([mask_BT.new_ones(len(rows), num_past), mask_BT], dim=1)
    logits: Tensor = model.model(input_ids=ids_BT, attention_mask=full_mask, **inputs, **_kept(model, 1)).logits[:, -1]
    return logits


def _repeated(model: SoupModel, past: Any, num_rows: int) -> Any:
    repeated = new_past(model.model)
    for index, layer in enumerate(past.layers):
        repeated.update(layer.keys.expand(num_rows, -1, -1, -1), layer.values.expand(num_rows, -1, -1, -1), index)
    return repeated


def _kept(model: SoupModel, num_logits: int) -> dict[str, int]:
    accepted = inspect.signature(model.model.forward).parameters
    return {"logits_to_keep": num_logits} if "logits_to_keep" in accepted else {}
