"""Chooses the next token of each row of a running batch, with the sampling parameters of the row's request.

Shapes: N = rows, V = vocabulary size, L = number of reported log-probabilities.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from personalized_soups.generation.sampling import choose_tokens, uniforms

# Minimum number of random numbers that a row generates at once.
_DRAWS = 256

# Maximum magnitude of a parameter. No useful parameter is larger, and sums of such numbers cannot overflow float32.
_MAX_MAGNITUDE = 1e6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters for choosing the tokens of an answer. Most names and meanings are those of OpenAI's protocol.

    Attributes:
        temperature: the logits are divided by this number. With 0, the likeliest token is chosen.
        top_p: tokens are drawn from the smallest set of likeliest tokens whose probabilities sum to at least this.
        seed: the seed of the random numbers. They depend only on `seed` and `place`, as in SoupModel.generate.
        place: the number of the answer. Answers with the same seed and different numbers differ.
        presence_penalty: subtracted from the logit of every token that the answer already contains.
        frequency_penalty: subtracted from a token's logit once for each time that the answer contains the token.
        logit_bias: for each token id, the number that is added to its logit.
        logprobs: number of likeliest tokens to report with each chosen token; None reports no log-probabilities.

    Raises:
        ValueError: if a parameter is out of its range. Such a parameter would fail a step that other requests share.
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
        """Whether the logits are used without penalties and bias."""
        return not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position of an answer.

    Attributes:
        chosen: the log-probability of the chosen token.
        top: the ids and log-probabilities of the likeliest tokens. The likeliest token is first.
    """

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of one row.

    Attributes:
        token: the chosen token.
        logprobs: the log-probabilities at this position, if the request asked for them.
        is_sound: whether the largest logit is finite. Large weights of experts can overflow the model's dtype.
    """

    token: int
    logprobs: TokenLogprobs | None
    is_sound: bool = True


class TokenSampler:
    """Chooses the tokens of one answer.

    Attributes:
        params: how the tokens are chosen.
        num_chosen: number of tokens chosen so far.

    Args:
        params: how the tokens are chosen.
    """

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self.num_chosen = 0
        self._draws: list[float] = []
        self._counts: Counter[int] = Counter()
        self._bias: tuple[Tensor, Tensor] | None = None  # token ids and biases on the model's device

    def draw(self) -> float:
        """Return the random number for the next token, from 0 (included) to 1 (excluded)."""
        if self.num_chosen >= len(self._draws):
            count = max(_DRAWS, 2 * len(self._draws))
            self._draws = uniforms(self.params.seed, self.params.place, count).tolist()
        return self._draws[self.num_chosen]

    def adjust(self, logits_V: Tensor) -> None:
        """Add the bias to a row's logits and subtract the penalties, in place."""
        params = self.params
        if params.logit_bias:
            if self._bias is None:
                self._bias = _index(params.logit_bias, logits_V), logits_V.new_tensor(list(params.logit_bias.values()))
            logits_V.index_add_(0, *self._bias)
        if self._counts and (params.presence_penalty or params.frequency_penalty):
            penalties = [params.presence_penalty + params.frequency_penalty * count for count in self._counts.values()]
            logits_V.index_add_(0, _index(self._counts, logits_V), logits_V.new_tensor(penalties), alpha=-1)

    def record(self, token: int) -> None:
        """Record that a token was chosen. `draw` and `adjust` depend on the tokens chosen so far."""
        self.num_chosen += 1
        if self.params.presence_penalty or self.params.frequency_penalty:
            self._counts[token] += 1


def choose(logits_NV: Tensor, samplers: Sequence[TokenSampler]) -> list[Choice]:
    """Choose the next token of every row, record it in the row's sampler, and return the choices.

    Args:
        logits_NV: the model's logits in any floating-point dtype. They are not changed.
        samplers: the sampler of each row.
    """
    adjusted_NV = _adjusted(logits_NV, samplers)
    token_N = _tokens(adjusted_NV, samplers)
    # The maximum of a row with NaN or infinity is not finite. Stacking needs only one copy from the device.
    tokens, is_sound = torch.stack([token_N, logits_NV.amax(-1).isfinite().long()]).tolist()
    logprobs = _logprobs(logits_NV, tokens, [sampler.params.logprobs for sampler in samplers])
    for sampler, token in zip(samplers, tokens, strict=True):
        sampler.record(token)
    return [Choice(token, logprobs.get(row), bool(is_sound[row])) for row, token in enumerate(tokens)]


def _adjusted(logits_NV: Tensor, samplers: Sequence[TokenSampler]) -> Tensor:
    rows = [row for row, sampler in enumerate(samplers) if not sampler.params.is_plain]
    if not rows:
        return logits_NV
    # the wider dtype represents every logit exactly, so this conversion does not change the other rows' tokens
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
    """Return the log-probabilities for each row that reports them. The keys are the indices of the rows.

    Temperature, penalties and bias are not applied.
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
    # JSON has no infinity; OpenAI's protocol uses -9999 for very unlikely tokens
    return value if math.isfinite(value) else -9999.0


def _index(tokens: Mapping[int, object], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)
