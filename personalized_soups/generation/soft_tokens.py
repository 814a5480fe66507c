"""Put soft tokens into rows of token ids. A soft token is a vector that takes the place of a token's embedding.

The soft tokens of a row come before its prompt, but after the beginning-of-sequence token, if the row starts with it.

Shapes: B = rows of the batch, T = tokens of a row, N = soft tokens of one row, H = width of the embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from personalized_soups.errors import UsageError
from personalized_soups.generation.sampling import pad_left


def soft_start(ids: Sequence[int], bos_id: int | None) -> int:
    """Return the place of the first soft token in a row: 1 if the row starts with the token `bos_id`, else 0."""
    return 1 if bos_id is not None and len(ids) > 0 and ids[0] == bos_id else 0


def with_room(ids: Sequence[int], num_soft: int, *, bos_id: int | None, filler: int) -> list[int]:
    """Return a row with `num_soft` copies of the id `filler` in the places of its soft tokens."""
    start = soft_start(ids, bos_id)
    return [*ids[:start], *[filler] * num_soft, *ids[start:]]


def with_soft_tokens(
    model: Any, prompts: list[list[int]], soft: Sequence[Tensor | None], *, bos_id: int | None, filler: int
) -> tuple[list[list[int]], dict[str, Any]]:
    """Return prompts with fillers for their soft tokens, and further arguments of transformers' generate.

    Without soft tokens, the prompts are returned as they are, and the model embeds them itself.
    """
    if all(own is None for own in soft):
        return prompts, {}
    roomy = [
        ids if own is None else with_room(ids, len(own), bos_id=bos_id, filler=filler)
        for ids, own in zip(prompts, soft, strict=True)
    ]
    ids_BT, _ = pad_left(roomy, filler, model.device)
    starts = [ids_BT.shape[1] - len(ids) + soft_start(own, bos_id) for ids, own in zip(roomy, prompts, strict=True)]
    with torch.no_grad():
        return roomy, {"inputs_embeds": embedded(model, ids_BT, soft, starts)}


def embedded(model: Any, ids_BT: Tensor, soft: Sequence[Tensor | None], starts: Sequence[int]) -> Tensor:
    """Return the embeddings of a batch, in which each row's soft tokens replace the embeddings of its fillers.

    Args:
        model: a causal language model of transformers.
        ids_BT: int64 token ids, with fillers in the places of the soft tokens.
        soft: for each row, its soft tokens [N, H], or None. Gradients flow back to them.
        starts: for each row, the column of its first soft token.

    Returns:
        [B, T, H], a new tensor with the dtype and the device of the model's embeddings.
    """
    base_BTH: Tensor = model.get_input_embeddings()(ids_BT)
    placed = [(row, start, own) for row, (start, own) in enumerate(zip(starts, soft, strict=True)) if own is not None]
    if not placed:
        return base_BTH.clone()
    device = base_BTH.device
    rows = torch.cat([torch.full((len(own),), row, device=device) for row, _, own in placed])
    columns = torch.cat([torch.arange(start, start + len(own), device=device) for _, start, own in placed])
    values = torch.cat([own.to(device=device, dtype=base_BTH.dtype) for _, _, own in placed])
    return base_BTH.index_put((rows, columns), values)


def embedding_width(model: Any) -> int:
    """Return H, the width of a model's token embeddings."""
    return int(model.get_input_embeddings().weight.shape[1])


def checked_soft_tokens(soft: Sequence[Tensor | None] | None, num_prompts: int, model: Any) -> list[Tensor | None]:
    """Return one entry for each prompt. Each entry must be None or a floating-point tensor [N, H] of finite numbers.

    If `soft` is None, all entries are None.

    Raises:
        UsageError: if the number of entries is not the number of prompts, or if an entry is anything else.
    """
    if soft is None:
        return [None] * num_prompts
    if len(soft) != num_prompts:
        raise UsageError(
            f"soft_tokens has {len(soft)} entries, but the number of prompts is {num_prompts}",
            where="soft_tokens",
            mend="give one entry for each prompt: its soft tokens, or None",
        )
    width = embedding_width(model)
    entry: Any  # callers may pass anything
    for row, entry in enumerate(soft):
        if entry is None:
            continue
        where = f"soft_tokens[{row}]"
        if not isinstance(entry, Tensor) or entry.ndim != 2 or not entry.is_floating_point():
            found = (
                f"has shape {list(entry.shape)} and dtype {str(entry.dtype).removeprefix('torch.')}"
                if isinstance(entry, Tensor)
                else f"is of type {type(entry).__name__}"
            )
            raise UsageError(
                f"soft tokens must be a floating-point tensor with two dimensions, but the value {found}",
                where=where,
                mend="give a tensor of shape [number of tokens, width of the base's embeddings], or None",
            )
        if entry.shape[1] != width:
            raise UsageError(
                f"the soft tokens have the width {entry.shape[1]}, but the base's embeddings have the width {width}",
                where=where,
                mend="give the base that the soft tokens were trained with",
            )
        if not bool(torch.isfinite(entry).all()):
            raise UsageError(
                "a soft token has a value that is NaN or infinite",
                where=where,
                mend="train the soft tokens again: their training diverged, or their file is damaged",
            )
    return list(soft)
