"""Draw the next token of each row, reproducibly.

A row's random number at a step depends only on the seed, the row's place and the step. So an answer does not depend on
the other rows of its batch (up to the rounding of batched arithmetic), and two models with equal seeds sample with the
same random numbers. transformers' own sampling draws from one stream for the whole batch.

Shapes: B = rows in the batch, T = tokens of a prompt, V = vocabulary size, N = new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The smallest temperature. A smaller number could become 0 in float32, and logits are divided by the temperature.
_COLDEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: the maximum number of tokens in an answer.
        temperature: divides the logits. At 0 the most likely token is taken.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more and finite, got {self.temperature}")


def uniforms(seed: int, row: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return `count` random float32 numbers in [0, 1) that depend only on `seed` and `row`.

    The random generator is Philox, whose key (here `seed` and `row`) selects an independent stream.
    """
    raw = np.random.Philox(key=[seed, row]).random_raw(count)
    # float32 holds 24 bits exactly, so no number rounds up to 1.
    return (raw >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)


def pad_left(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return int64 token ids and mask, padded on the left so that every prompt ends in the last column."""
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
    """Return the next token of each row, int64.

    At temperature 0, the next token is the most likely token. Otherwise it is the first token at which the cumulated
    probability exceeds the row's number in `draw_B`. A token of probability 0 is never chosen.

    Args:
        logits_BV: the logits of the next token.
        draw_B: random float32 numbers in [0, 1).
        temperature: divides the logits. Either one number for all rows, or a tensor with a number above 0 for each row.
        top_p_B: a number for each row, for nucleus sampling (arXiv 1904.09751). The candidates are the smallest set of
            most likely tokens whose probabilities sum to at least top_p. At 1, all tokens are candidates.
    """
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None].clamp(min=_COLDEST)
    elif temperature == 0:
        return logits_BV.argmax(-1)
    else:
        temperature = max(temperature, _COLDEST)
    logits_BV = logits_BV.float()
    # The largest logit becomes 0, so that dividing by a temperature near 0 cannot overflow.
    logits_BV = logits_BV - logits_BV.amax(-1, keepdim=True)
    share_BV = torch.softmax(logits_BV / temperature, dim=-1)
    if top_p_B is not None:
        share_BV = _nucleus(share_BV, top_p_B)
    cumulated_BV = share_BV.cumsum(-1)
    wanted_B1 = draw_B[:, None] * cumulated_BV[:, -1:]
    token_B = torch.searchsorted(cumulated_BV, wanted_B1, right=True)[:, 0]
    return token_B.clamp(max=logits_BV.shape[-1] - 1)


def _nucleus(share_BV: Tensor, top_p_B: Tensor) -> Tensor:
    """Return the probabilities, with 0 for all tokens that are not candidates under `top_p_B` (see `choose_tokens`)."""
    sorted_BV, order_BV = share_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    is_out_BV = (before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    is_out_BV[:, 0] = False  # the most likely token stays at any top_p
    return share_BV.masked_fill(torch.zeros_like(is_out_BV).scatter_(1, order_BV, is_out_BV), 0.0)


class DrawnTokens:
    """A logits processor for transformers' `generate(do_sample=False)` that leaves only the drawn token possible.

    Args:
        draws_BN: random float32 numbers in [0, 1), one for each row and new token.
        temperature: divides the logits. At 0 the most likely token is taken.
        prompt_width: the number of columns of the padded prompts. Later columns hold new tokens.
    """

    def __init__(self, draws_BN: Tensor, *, temperature: float, prompt_width: int) -> None:
        self._draws_BN = draws_BN
        self._temperature = temperature
        self._prompt_width = prompt_width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return new scores (B, V): 0 for the drawn token of each row, and minus infinity for all other tokens."""
        step = input_ids.shape[1] - self._prompt_width
        token_B = choose_tokens(scores, self._draws_BN[:, step], self._temperature)
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)
