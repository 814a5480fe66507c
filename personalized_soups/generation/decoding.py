"""One token after another, for a batch: the loop under batched and streamed generation.

Every row has its own random numbers: the draw of a row at a step depends on the seed and the row's place alone, so
that an answer does not depend on what else is in its batch (up to the rounding of batched arithmetic).

B rows in a batch, T tokens of a prompt, V vocabulary, N new tokens
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Args:
        max_new_tokens: an answer is cut there.
        temperature: logits are divided by it; 0 takes the likeliest token.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")


def uniforms(seed: int, row: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return `count` draws of [0, 1), float32, that depend on `seed` and `row` alone (Philox, counter-based)."""
    raw = np.random.Philox(key=[seed, row]).random_raw(count)
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return (ids_BT, mask_BT), int64, padded on the left so that every prompt ends in the last column."""
    width = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), width), pad)
    mask_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    for index, row in enumerate(rows):
        ids_BT[index, width - len(row) :] = torch.tensor(row)
        mask_BT[index, width - len(row) :] = 1
    return ids_BT.to(device), mask_BT.to(device)


@torch.no_grad()
def decode(
    model: Any, ids_BT: Tensor, mask_BT: Tensor, *, draws_BN: Tensor, sampling: Sampling, stop_ids: Collection[int]
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield, step by step, the rows that are not at their end and the token that each of them gets.

    A stop token is not yielded: its row is missing from then on. Finished rows leave the batch (and the cache) once
    they are half of it. No argument is changed; the model stays as it is.
    """
    places = torch.arange(ids_BT.shape[0], device=ids_BT.device)
    stops = torch.tensor(sorted(stop_ids), device=ids_BT.device)
    running = torch.ones_like(places, dtype=torch.bool)
    options = _options(model)
    cache = None
    step_BT, position_BT = ids_BT, (mask_BT.cumsum(-1) - 1).clamp(min=0)
    for step in range(sampling.max_new_tokens):
        out = model(
            input_ids=step_BT, attention_mask=mask_BT, position_ids=position_BT, past_key_values=cache, **options
        )
        cache = out.past_key_values
        token_B = choose_tokens(out.logits[:, -1], draws_BN[places, step], sampling.temperature)
        running &= ~torch.isin(token_B, stops)
        rows, tokens, alive = torch.stack([places, token_B, running.long()]).tolist()
        going = [(row, token) for row, token, still in zip(rows, tokens, alive, strict=True) if still]
        if not going:
            return
        yield [row for row, _ in going], [token for _, token in going]
        if len(going) * 2 <= len(rows):
            kept = running.nonzero()[:, 0]
            cache.batch_select_indices(kept)
            places, token_B, running = places[kept], token_B[kept], running[kept]
            mask_BT, position_BT = mask_BT[kept], position_BT[kept]
        step_BT = token_B[:, None]
        position_BT = position_BT[:, -1:] + 1
        mask_BT = torch.cat([mask_BT, mask_BT.new_ones(mask_BT.shape[0], 1)], dim=1)


def choose_tokens(logits_BV: Tensor, draw_B: Tensor, temperature: float) -> Tensor:
    """Return token_B, int64: the likeliest at temperature 0, else the one at quantile `draw_B` of the softmax.

    The quantile is taken over cumulated probabilities, so that a token of probability 0 is never chosen.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    cumulated_BV = torch.softmax(logits_BV.float() / temperature, dim=-1).cumsum(-1)
    wanted_B1 = draw_B[:, None] * cumulated_BV[:, -1:]
    token_B = torch.searchsorted(cumulated_BV, wanted_B1, right=True)[:, 0]
    return token_B.clamp(max=logits_BV.shape[-1] - 1)


def _options(model: Any) -> dict[str, Any]:
    """Return the options of every forward; only the last position's logits are wanted, where it can leave the rest."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    options: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(inner.forward).parameters:
        options["logits_to_keep"] = 1
    return options
