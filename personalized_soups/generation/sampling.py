"""How the next token is drawn: reproducibly, and for each row on its own.

The draw of a row at a step depends on the seed and the row's place alone, so that an answer does not depend on what
else is in its batch (up to the rounding of batched arithmetic), and two models that are asked with one seed answer from
common random numbers. transformers' own sampling takes its numbers from one stream for the whole batch.

B rows in a batch, T tokens of a prompt, V vocabulary, N new tokens
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What is less is 0 in float32, in which logits are divided.
_COLDEST = torch.finfo(torch.float32).tiny


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


def choose_tokens(
    logits_BV: Tensor, draw_B: Tensor, temperature: float | Tensor, top_p_B: Tensor | None = None
) -> Tensor:
    """Return token_B, int64: the likeliest at temperature 0, else the one at quantile `draw_B` of the softmax.

    The quantile is taken over cumulated probabilities, so that a token of probability 0 is never chosen.

    Args:
        logits_BV: of the next token.
        draw_B: draws of [0, 1), float32.
        temperature: logits are divided by it; one for all rows, or a tensor of one above 0 for each.
        top_p_B: of each row, the probability of the fewest likeliest tokens among which is drawn (nucleus sampling,
            arXiv 1904.09751); 1 draws among all.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None].clamp(min=_COLDEST)
    elif temperature == 0:
        return logits_BV.argmax(-1)
    else:
        temperature = max(temperature, _COLDEST)
    logits_BV = logits_BV.float()
    # the likeliest is divided as 0: a temperature near 0 makes no infinity of it
    logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    share_BV = torch.softmax(logits_BV / temperature, dim=-1)
    if top_p_B is not None:
        share_BV = _nucleus(share_BV, top_p_B)
    cumulated_BV = share_BV.cumsum(-1)
    wanted_B1 = draw_B[:, None] * cumulated_BV[:, -1:]
    token_B = torch.searchsorted(cumulated_BV, wanted_B1, right=True)[:, 0]
    return token_B.clamp(max=logits_BV.shape[-1] - 1)


def _nucleus(share_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Return the shares of the fewest likeliest tokens that reach `top_p_B` together, and 0 for the rest."""
    sorted_BV, order_BV = share_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    is_out_BV = (before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    is_out_BV[:, 0] = False  # the likeliest stays, whatever top_p is
    return share_BV.masked_fill(torch.zeros_like(is_out_BV).scatter_(1, order_BV, is_out_BV), 0.0)


class DrawnTokens:
    """A logits processor for transformers' `generate(do_sample=False)`: leaves one token possible, the one drawn.

    Args:
        draws_BN: draws of [0, 1), float32, a row for each row of the batch, a column for each new token.
        temperature: logits are divided by it; 0 takes the likeliest token.
        prompt_width: columns of the padded prompts, so that the step is known.
    """

    def __init__(self, draws_BN: Tensor, *, temperature: float, prompt_width: int) -> None:
        self._draws_BN = draws_BN
        self._temperature = temperature
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return scores_BV: 0 for the drawn token of each row, minus infinity for the rest; changes no argument."""
        step = input_ids.shape[1] - self._prompt_width
        token_B = choose_tokens(scores, self._draws_BN[:, step], self._temperature)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)
