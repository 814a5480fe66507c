"""How every row of a running batch chooses its next token: each by what its request asks for.

N rows, V vocabulary, L tokens whose log-probabilities are told.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from personalized_soups.generation.sampling import choose_tokens, uniforms

# Draws of one row that are made at once.
_DRAWS = 256

# Beyond any sense; sums of such numbers are far from float32's end.
_MOST = 1e6


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of an answer are chosen; names and meanings are those of OpenAI's protocol.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: draw among the fewest likeliest tokens that have this probability together.
        seed, place: of the draws, which depend on nothing else (as in SoupModel.generate).
        presence_penalty: taken from the logits of tokens that the answer has already.
        frequency_penalty: taken once for each time that it has them.
        logit_bias: added to the logits of tokens.
        logprobs: how many likeliest tokens are told of at each place beside the chosen one; None tells nothing.

    Raises:
        ValueError: if one of them is out of its range, which would be a fault of everybody's step later.
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
            ("temperature", self.temperature, 0, _MOST),
            ("top_p", self.top_p, 0, 1),
            ("seed", self.seed, 0, 2**64 - 1),
            ("place", self.place, 0, 2**64 - 1),
            ("presence_penalty", self.presence_penalty, -_MOST, _MOST),
            ("frequency_penalty", self.frequency_penalty, -_MOST, _MOST),
            ("logprobs", self.logprobs or 0, 0, math.inf),
            *((f"logit_bias of {token}", bias, -_MOST, _MOST) for token, bias in self.logit_bias.items()),
        )
        for name, value, low, high in ranges:
            if not low <= value <= high:
                raise ValueError(f"{name} must be from {low} to {high}, got {value}")

    @property
    def is_plain(self) -> bool:
        """Whether the logits are taken as they are."""
        return not (self.presence_penalty or self.frequency_penalty or self.logit_bias)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probability of the chosen token, and the likeliest ones with theirs."""

    chosen: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Choice:
    """The next token of one row.

    Args:
        token: that was chosen.
        likely: its log-probabilities, where they are asked for.
        is_sound: whether the logits were numbers; a soup may be too much for the model's dtype.
    """

    token: int
    likely: TokenLogprobs | None
    is_sound: bool = True


class TokenSampler:
    """Chooses the tokens of one answer, one after another."""

    def __init__(self, wishes: SamplingParams) -> None:
        self.wishes = wishes
        self.num_chosen = 0
        self._draws: list[float] = []
        self._counts: Counter[int] = Counter()
        self._bias: tuple[Tensor, Tensor] | None = None  # tokens and what is added, made once

    def draw(self) -> float:
        """Return the next number of [0, 1)."""
        if self.num_chosen >= len(self._draws):
            count = max(_DRAWS, 2 * len(self._draws))
            self._draws = uniforms(self.wishes.seed, self.wishes.place, count).tolist()
        return self._draws[self.num_chosen]

    def adjust(self, logits_V: Tensor) -> None:
        """Change a row's logits in place by what is asked for."""
        wishes = self.wishes
        if wishes.logit_bias:
            if self._bias is None:
                self._bias = _index(wishes.logit_bias, logits_V), logits_V.new_tensor(list(wishes.logit_bias.values()))
            logits_V.index_add_(0, *self._bias)
        if self._counts and (wishes.presence_penalty or wishes.frequency_penalty):
            taken = [wishes.presence_penalty + wishes.frequency_penalty * times for times in self._counts.values()]
            logits_V.index_add_(0, _index(self._counts, logits_V), logits_V.new_tensor(taken), alpha=-1)

    def note(self, token: int) -> None:
        """Take the token as chosen."""
        self.num_chosen += 1
        if self.wishes.presence_penalty or self.wishes.frequency_penalty:
            self._counts[token] += 1


def choose(logits_NV: Tensor, choosers: Sequence[TokenSampler]) -> list[Choice]:
    """Return the next token of every row, and let each chooser know.

    Args:
        logits_NV: of the model, any float dtype; left as they are.
        choosers: of the rows.
    """
    drawn_from_NV = _adjusted(logits_NV, choosers)
    token_N = _tokens(drawn_from_NV, choosers)
    # infinity and NaN come through a maximum; all is copied from the device at once
    tokens, is_sound = torch.stack([token_N, logits_NV.amax(-1).isfinite().long()]).tolist()
    likely = _likely(logits_NV, tokens, [each.wishes.logprobs for each in choosers])
    for each, token in zip(choosers, tokens, strict=True):
        each.note(token)
    return [Choice(token, likely.get(row), bool(is_sound[row])) for row, token in enumerate(tokens)]


def _adjusted(logits_NV: Tensor, choosers: Sequence[TokenSampler]) -> Tensor:
    adjusted = [row for row, each in enumerate(choosers) if not each.wishes.is_plain]
    if not adjusted:
        return logits_NV
    # every row keeps all of its bits, so that it does not matter to the others
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32), copy=True)
    for row in adjusted:
        choosers[row].adjust(logits_NV[row])
    return logits_NV


def _tokens(logits_NV: Tensor, choosers: Sequence[TokenSampler]) -> Tensor:
    drawn = [row for row, each in enumerate(choosers) if each.wishes.temperature > 0]
    token_N = logits_NV.argmax(-1)
    if drawn:
        device = logits_NV.device
        some_NV = logits_NV if len(drawn) == len(choosers) else logits_NV[drawn]
        wishes = [choosers[row].wishes for row in drawn]
        token_N[drawn] = choose_tokens(
            some_NV,
            torch.tensor([choosers[row].draw() for row in drawn], dtype=torch.float32, device=device),
            torch.tensor([each.temperature for each in wishes], device=device),
            torch.tensor([each.top_p for each in wishes], device=device) if min(w.top_p for w in wishes) < 1 else None,
        )
    return token_N


def _likely(logits_NV: Tensor, tokens: Sequence[int], counts: Sequence[int | None]) -> dict[int, TokenLogprobs]:
    """Return the model's own log-probabilities, before temperature and penalties, of the rows that ask for them."""
    found: dict[int, TokenLogprobs] = {}
    for count in sorted({count for count in counts if count is not None}):
        rows = [row for row, its in enumerate(counts) if its == count]
        logprobs_NV = torch.log_softmax(logits_NV[rows].float(), dim=-1)
        token_N1 = torch.tensor([tokens[row] for row in rows], device=logits_NV.device)[:, None]
        values_NL, indices_NL = logprobs_NV.topk(min(count, logprobs_NV.shape[1]))
        chosen = logprobs_NV.gather(1, token_N1)[:, 0].tolist()
        for row, own, values, indices in zip(rows, chosen, values_NL.tolist(), indices_NL.tolist(), strict=True):
            found[row] = TokenLogprobs(_finite(own), tuple(zip(indices, map(_finite, values), strict=True)))
    return found


def _finite(value: float) -> float:
    # JSON knows no infinity; OpenAI's protocol says -9999 for "very unlikely"
    return value if math.isfinite(value) else -9999.0


def _index(tokens: Mapping[int, object], like: Tensor) -> Tensor:
    return torch.tensor(list(tokens), dtype=torch.int64, device=like.device)
