"""How each row of a running batch chooses its next token, according to its own request.

N rows, V vocabulary, L reported log-probabilities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from personalized_soups.generation.sampling import choose_tokens, uniforms

# Random numbers that a row makes at once.
_DRAWS = 256

# Larger than any useful parameter; sums of such numbers are far below the largest float32.
_MAX_MAGNITUDE = 1e6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are chosen. Names and meanings are those of OpenAI's protocol.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draw from the smallest set of likeliest tokens whose probabilities sum to at least this.
        seed: seed of the random numbers, which depend on `seed` and `place` only (as in SoupModel.generate).
        place: number of the answer, so that several answers with one seed differ.
        presence_penalty: subtracted from the logits of tokens that the answer contains.
        frequency_penalty: subtracted once for each time that the answer contains the token.
        logit_bias: added to the logits, by token id.
        logprobs: how many of the likeliest tokens are reported with each chosen one; None reports no log-probabilities.

    Raises:
        ValueError: if a parameter is out of its range. Undetected, it would fail a step that other requests share.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    place: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: int | None = None

    def __post_init__(self) -> None:
        ranges: tuple[tuple[str, float, float, float], ...] = (
            ("temperature", self.temperature, 0, _MAX_MAGNITUDE),
            ("top_p", self.top_p, 0, 1),
            ("seed", self.seed, 0, 2**64 - 1),
            ("place", self.place, 0, 2**64 - 1),
            ("presence_penalty", self.presence_penalty, -_MAX_MAGNITUDE, _MAX_MAGNITUDE),
            ("frequency_penalty", self.frequency_penalty, -_MAX_MAGNITUDE, _MAX_MAGNITUDE),
            ("logprobs", self.logprobs or 0, 0, math.inf),
            *(
                (f"logit_bias of {token}", bias, -_MAX_MAGNITUDE, _MAX_MAGNITUDE)
                for token, bias in self.logit_bias.items()
            ),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")

    @property
    def is_plain(self) -> bool:
        """Whether no penalty and no bias changes the logits."""
        return not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position of an answer.

    Attributes:
        chosen: of the chosen token.
        top: the likeliest tokens with theirs, the likeliest first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of one row.

    Attributes:
        token: the chosen token.
        logprobs: its log-probabilities, if the request asked for them.
        is_sound: whether the logits were finite; large weights can overflow the model's dtype.
    """

    token: int
    logprobs: TokenLogprobs | None
    is_sound: bool = True


class TokenSampler:
    """Chooses the tokens of one answer.

    Attributes:
        params: how the tokens are chosen.
        num_chosen: tokens chosen so far.

    Args:
        params: how the tokens are chosen.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.num_chosen = 0
        self._draws: list[float] = []
        self._counts: Counter[int] = Counter()
        self._bias: tuple[Tensor, Tensor] | None = None  # token ids and biases on the device, copied once

    def draw(self) -> float:
        """Return the random number of the next token, from [0, 1)."""
        if self.num_chosen >= len(self._draws):
            count = max(_DRAWS, 2 * len(self._draws))
            self._draws = uniforms(self.params.seed, self.params.place, count).tolist()
        return self._draws[self.num_chosen]

    def adjust(self, logits_V: Tensor) -> None:
        """Apply bias and penalties to a row's logits, in place."""
        params = self.params
        if params.logit_bias:
            if self._bias is None:
                self._bias = _index(params.logit_bias, logits_V), logits_V.new_tensor(list(params.logit_bias.values()))
            logits_V.index_add_(0, *self._bias)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            penalties = [params.presence_penalty + params.frequency_penalty * count for count in self._counts.values()]
            logits_V.index_add_(0, _index(self._counts, logits_V), logits_V.new_tensor(penalties), alpha=-1)

    def record(self, token: int) -> None:
        """Count a token as chosen."""
        self.num_chosen += 1
        if self.params.presence_penalty or self.params.frequency_penalty:
            self._counts[token] += 1


def choose(logits_NV: Tensor, samplers: Sequence[TokenSampler]) -> list[Choice]:
    """Return the next token of every row, and record it in the row's sampler.

    Args:
        logits_NV: of the model, in any float dtype; not changed.
        samplers: one for each row.
    """
    adjusted_NV = _adjusted(logits_NV, samplers)
    token_N = _tokens(adjusted_NV, samplers)
    # the maximum of a row with NaN or infinity is not finite; one copy brings everything from the device
    tokens, is_sound = torch.stack([token_N, logits_NV.amax(-1).isfinite().long()]).tolist()
    logprobs = _logprobs(logits_NV, tokens, [sampler.params.logprobs for sampler in samplers])
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.record(token)
    return [Choice(token, logprobs.get(row), bool(is_sound[row])) for row, token in enumerate(tokens)]


def _adjusted(logits_NV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    rows = [row for row, sampler in enumerate(samplers) if not sampler.params.is_plain]
    if not rows:
        return logits_NV
    # widening keeps every bit of the rows that are not adjusted, so their tokens do not depend on the others
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    for row in rows:
        samplers[row].adjust(logits_NV[row])
    return logits_NV


def _tokens(logits_NV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    rows = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    token_N = logits_NV.argmax(-1)
    if rows:
        device = logits_NV.device
        drawn_NV = logits_NV if len(rows) == len(samplers) else logits_NV[rows]
        params = [samplers[row].params for row in rows]
        top_p_N = None  # choose_tokens then skips sorting the vocabulary
        if min(row_params.top_p for row_params in params) < 1:
            top_p_N = torch.tensor([row_params.top_p for row_params in params], device=device)
        token_N[rows] = choose_tokens(
            drawn_NV,
            torch.tensor([samplers[row].draw() for row in rows], dtype=torch.float32, device=device),
            torch.tensor([row_params.temperature for row_params in params], device=device),
            top_p_N,
        )
    return token_N


def _logprobs(logits_NV: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> dict[int, TokenLogprobs]:
    """Return log-probabilities by row, for the rows that report them.

    They are the model's own: before temperature, penalties and bias.
    """
    logprobs: dict[int, TokenLogprobs] = {}
    for count in sorted({count for count in counts if count is not None}):
        rows = [row for row, row_count in enumerate(counts) if row_count == count]
        logprobs_NV = torch.log_softmax(logits_NV[rows].float(), dim=-1)
        token_N1 = torch.tensor([tokens[row] for row in rows], device=logits_NV.device)[:, None]
        values_NL, indices_NL = logprobs_NV.topk(min(count, logprobs_NV.shape[1]))
        chosen_N = logprobs_NV.gather(1, token_N1)[:, 0].tolist()
        for row, chosen, values, indices in zip(rows, chosen_N, values_NL.tolist(), indices_NL.tolist(), strict=True):
            logprobs[row] = TokenLogprobs(_finite(chosen), tuple(zip(indices, map(_finite, values), strict=True)))
    return logprobs


def _finite(value: float) -> float:
    # JSON has no infinity; OpenAI's protocol uses -9999 for "very unlikely"
    return value if math.isfinite(value) else -9999.0


def _index(tokens: Mapping[int, object], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)
