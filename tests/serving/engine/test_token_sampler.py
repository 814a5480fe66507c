"""The token sampler, compared with NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from personalized_soups.generation.sampling import choose_tokens, uniforms
from personalized_soups.serving.engine.token_sampler import Choice, SamplingParams, TokenSampler, choose

V = 40

Vector = np.ndarray[Any, np.dtype[np.float64]]


def _logits(seed: int, rows: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))).to(dtype)


def _adjusted(logits: Vector, params: SamplingParams, before: list[int]) -> Vector:
    """Return a row's logits with bias and penalties, as OpenAI's protocol defines them."""
    adjusted = logits.copy()
    for token, bias in params.logit_bias.items():
        adjusted[token] += bias
    for token in set(before):
        adjusted[token] -= params.presence_penalty + params.frequency_penalty * before.count(token)
    return adjusted


def _nucleus(logits: Vector, temperature: float, top_p: float) -> Vector:
    """Return the probabilities of the tokens that may be drawn, by a loop from the likeliest token on."""
    scaled = (logits - logits.max()) / temperature
    shares = np.exp(scaled) / np.exp(scaled).sum()
    kept = np.zeros_like(shares)
    reached = 0.0
    for token in sorted(range(len(shares)), key=lambda token: (-shares[token], token)):
        if reached >= top_p and top_p < 1 and reached:
            break
        kept[token] = shares[token]
        reached += shares[token]
    probabilities: Vector = kept / kept.sum()
    return probabilities


def _selects(shares: Vector, token: int, draw: float) -> bool:
    """Return whether a draw selects a token; float32 sums of 40 shares are off by less than 1e-5."""
    ends = shares.cumsum()
    return bool(shares[token] > 0 and ends[token] - shares[token] - 1e-5 <= draw <= ends[token] + 1e-5)


_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]),
    seed=st.integers(0, 2**63),
    place=st.integers(0, 9),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
    frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.4]),
    logit_bias=st.dictionaries(st.integers(0, V - 1), st.floats(-100, 100, width=16), max_size=3),
    logprobs=st.sampled_from([None, None, 0, 3, 20, 99]),
)


@settings(max_examples=60, deadline=None)
@given(row_params=st.lists(_params, min_size=1, max_size=5), seed=st.integers(0, 999))
def test_every_row_chooses_by_its_own_parameters(row_params: list[SamplingParams], seed: int) -> None:
    samplers = [TokenSampler(params) for params in row_params]
    chosen: list[list[int]] = [[] for _ in row_params]
    for step in range(6):
        logits_NV = _logits(1000 * seed + step, len(row_params))
        kept = logits_NV.clone()
        choices = choose(logits_NV, samplers)
        assert torch.equal(logits_NV, kept)
        for row, (params, choice) in enumerate(zip(row_params, choices, strict=True)):
            own = logits_NV[row].double().numpy()
            wanted = _adjusted(own, params, chosen[row])
            if params.temperature == 0:
                # float32's rounding of sums below 128
                assert wanted[choice.token] >= wanted.max() - 128 * 1.2e-7
            else:
                draw = float(uniforms(params.seed, params.place, step + 1)[step])
                assert _selects(_nucleus(wanted, params.temperature, params.top_p), choice.token, draw)
            _check_logprobs(own, params, choice)
            chosen[row].append(choice.token)


def _check_logprobs(logits: Vector, params: SamplingParams, choice: Choice) -> None:
    if params.logprobs is None:
        assert choice.logprobs is None
        return
    assert choice.logprobs is not None
    logprobs = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    assert choice.logprobs.chosen == pytest.approx(logprobs[choice.token], abs=1e-5)
    top = sorted(range(V), key=lambda token: -logprobs[token])[: params.logprobs]
    assert [token for token, _ in choice.logprobs.top] == top
    assert [value for _, value in choice.logprobs.top] == pytest.approx(list(logprobs[top]), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(mine=_params, others=st.lists(_params, min_size=1, max_size=4), seed=st.integers(0, 999))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_parameters_of_other_rows_change_nothing(
    mine: SamplingParams, others: list[SamplingParams], seed: int, dtype: torch.dtype
) -> None:
    def tokens(params: list[SamplingParams]) -> list[Choice]:
        samplers = [TokenSampler(each) for each in params]
        return [choose(_logits(seed + step, len(params), dtype=dtype), samplers)[0] for step in range(4)]

    plain = tokens([mine, *(SamplingParams() for _ in others)])
    assert tokens([mine, *others]) == plain


def test_other_rows_do_not_round_logits_of_float64() -> None:
    logits_NV = torch.zeros(2, V, dtype=torch.float64)
    logits_NV[0, 7] = 1e-12  # float32 holds this number, but not 1 plus it
    logits_NV[0] += 1
    alone = choose(logits_NV[:1], [TokenSampler(SamplingParams())])
    together = choose(logits_NV, [TokenSampler(SamplingParams()), TokenSampler(SamplingParams(logit_bias={3: 1.0}))])
    assert alone[0].token == together[0].token == 7


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 0.6), (1.5, 0.95), (1.0, 0.0)])
def test_frequencies_are_the_probabilities_of_the_nucleus(temperature: float, top_p: float) -> None:
    logits = _logits(5, 1)
    count = 20000
    draw_B = torch.from_numpy(uniforms(7, 0, count))
    temperature_B, top_p_B = torch.full((count,), temperature), torch.full((count,), top_p)
    tokens = choose_tokens(logits.expand(count, -1), draw_B, temperature_B, top_p_B)
    got = torch.bincount(tokens, minlength=V).double().numpy() / count
    want = _nucleus(logits[0].double().numpy(), temperature, top_p)
    assert not got[want == 0].any()
    # The mean of half the sum of |got - want| is at most half the sum of sqrt(p (1 - p) / n) (Jensen). One draw changes
    # the sum by 1 / n, so it exceeds its mean by t with probability exp(-2 n t^2) (McDiarmid), 1e-9 here.
    mean = 0.5 * np.sqrt(want * (1 - want) / count).sum()
    assert 0.5 * np.abs(got - want).sum() < mean + math.sqrt(math.log(1e9) / (2 * count))


def test_draws_continue_beyond_the_first_block() -> None:
    sampler = TokenSampler(SamplingParams(temperature=1.0, seed=3, place=2))
    draws = []
    for _ in range(700):
        draws.append(sampler.draw())
        sampler.record(0)
    assert draws == uniforms(3, 2, 700).tolist()


def test_a_row_gets_the_tokens_of_choose_tokens() -> None:
    logits_BV = _logits(9, 8)
    draw_B = torch.from_numpy(np.stack([uniforms(4, place, 1)[0] for place in range(8)]))
    samplers = [TokenSampler(SamplingParams(temperature=0.8, seed=4, place=place)) for place in range(8)]
    tokens = [choice.token for choice in choose(logits_BV, samplers)]
    assert tokens == choose_tokens(logits_BV, draw_B, 0.8).tolist()


def test_logits_that_are_not_finite_are_reported_and_leave_other_rows_as_they_are() -> None:
    logits_NV = _logits(1, 4)
    logits_NV[1, 5] = math.nan
    logits_NV[2, 6] = math.inf
    params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=2)
    choices = choose(logits_NV, [TokenSampler(params) for _ in range(4)])
    assert [choice.is_sound for choice in choices] == [True, False, False, True]
    assert all(0 <= choice.token < V for choice in choices)
    sound = choose(_logits(1, 4), [TokenSampler(params) for _ in range(4)])
    assert (choices[0], choices[3]) == (sound[0], sound[3])


def test_an_impossible_token_has_the_log_probability_that_the_protocol_uses() -> None:
    logits_NV = torch.full((1, V), -math.inf)
    logits_NV[0, 3] = 1.0
    (choice,) = choose(logits_NV, [TokenSampler(SamplingParams(logprobs=2))])
    assert choice.is_sound
    assert choice.logprobs is not None
    assert choice.logprobs.chosen == 0
    assert choice.logprobs.top[0] == (3, 0.0)
    assert choice.logprobs.top[1][1] == -9999


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": -0.1},
        {"temperature": math.inf},
        {"temperature": math.nan},
        {"top_p": 1.1},
        {"top_p": -0.1},
        {"seed": -1},
        {"seed": 2**64},
        {"place": -1},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"logit_bias": {3: -math.inf}},
        {"logprobs": -1},
    ],
)
def test_a_parameter_out_of_its_range_is_rejected(params: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(params))):
        SamplingParams(**params)
