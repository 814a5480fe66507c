"""Draw the next token of each row, reproducibly.

A row's draw at a step depends on the seed and the row's place alone. So an answer does not depend on the other rows of
its batch (up to the rounding of batched arithmetic), and two models with equal seeds answer from common random numbers.
transformers' own sampling draws from one stream for the whole batch.

B rows in a batch, T tokens of a prompt, V vocabulary, N new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

# The smallest temperature: a smaller number is 0 in float32, by which logits would be divided.
_COLDEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: the longest answer.
        temperature: logits are divided by it; 0 takes the most likely token.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")


def uniforms(seed: int, row: int, count: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Return `count` draws of [0, 1), float32, that depend on `seed` and `row` alone.

    The generator is Philox, which is counter-based: its key selects a stream without any earlier draws.
    """
    raw = np.random.Philox(key=[seed, row]).random_raw(count)
    # 24 bits are the most that float32 holds exactly, so no draw rounds up to 1.
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
    """Return token_B, int64: at temperature 0 the most likely token, else the token at the softmax's quantile `draw_B`.

    The quantile is taken over cumulated probabilities, so a token of probability 0 is never chosen.

    Args:
        logits_BV: of the next token.
        draw_B: draws of [0, 1), float32.
        temperature: logits are divided by it; a number for all rows, or a tensor with a number above 0 for each row.
        top_p_B: for each row, draw among the fewest most likely tokens whose probabilities sum to top_p (nucleus
            sampling, arXiv 1904.09751); 1 draws among all tokens.
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
    """Return the probabilities of the fewest most likely tokens that sum to `top_p_B`, and 0 for the others."""
    sorted_BV, order_BV = share_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    is_out_BV = (before_BV >= top_p_B[:, None]) & (top_p_B[:, None] < 1)
    is_out_BV[:, 0] = False  # the most likely token stays at any top_p
    return share_BV.masked_fill(torch.zeros_like(is_out_BV).scatter_(1, order_BV, is_out_BV), 0.0)


class DrawnTokens:
    """A logits processor for transformers' `generate(do_sample=False)` that leaves only the drawn token possible.

    Args:
        draws_BN: draws of [0, 1), float32: a row for each row of the batch, a column for each new token.
        temperature: logits are divided by it; 0 takes the most likely token.
        prompt_width: columns of the padded prompts; later columns are new tokens.
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
