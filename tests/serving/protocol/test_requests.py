"""The meaning of requests: defaults, ignored and unsupported parameters, bounds, and sampling parameters."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from personalized_soups.serving.engine.token_sampler import SamplingParams
from personalized_soups.serving.protocol.requests import ChatRequest, CompletionRequest


def _chat(**options: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], **options})


def _completion(**options: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "x", **options})


def test_defaults_are_the_protocols() -> None:
    body = _chat()
    assert body.sampling_params(5, 2) == SamplingParams(temperature=1.0, top_p=1.0, seed=5, place=2)
    assert (body.num_choices, body.num_tokens, body.stops, body.includes_usage) == (1, None, (), False)
    assert (body.default_max_tokens, _completion().default_max_tokens) == (None, 16)


def test_every_sampling_parameter_is_passed_on() -> None:
    given = {"temperature": 0.25, "top_p": 0.5, "presence_penalty": 1.5, "frequency_penalty": -0.5, "seed": 9}
    body = _chat(**given, logit_bias={"7": -2.5}, logprobs=True, top_logprobs=4)
    want = SamplingParams(
        temperature=0.25, top_p=0.5, seed=9, place=3, presence_penalty=1.5, frequency_penalty=-0.5,
        logit_bias={7: -2.5}, logprobs=4,
    )  # fmt: skip
    assert body.sampling_params(5, 3) == want


def test_a_zero_is_a_value_and_not_a_default() -> None:
    body = _chat(temperature=0, top_p=0, seed=0, logprobs=True).sampling_params(5, 0)
    assert (body.temperature, body.top_p, body.seed, body.logprobs) == (0.0, 0.0, 0, 0)
    assert _completion(logprobs=0).num_logprobs == 0
    assert _completion().num_logprobs is None
    assert _chat(logprobs=False).num_logprobs is None


def test_a_negative_seed_is_distinct() -> None:
    assert _chat(seed=-1).sampling_params(5, 0).seed == 2**64 - 1
    assert _chat(seed=2**63 - 1).sampling_params(5, 0).seed == 2**63 - 1


def test_max_completion_tokens_precedes_max_tokens() -> None:
    assert _chat(max_completion_tokens=3, max_tokens=7).num_tokens == 3
    assert _chat(max_tokens=7).num_tokens == 7
    assert _chat(max_completion_tokens=3).num_tokens == 3


def test_empty_stop_strings_are_ignored() -> None:
    assert _chat(stop="").stops == ()
    assert _chat(stop=["", "a", "b"]).stops == ("a", "b")
    assert _chat(stop="ab").stops == ("ab",)


@pytest.mark.parametrize(
    "harmless",
    [{"tools": []}, {"tools": None}, {"tool_choice": "auto"}, {"response_format": {"type": "text"}},
     {"metadata": {"a": "b"}}, {"store": True}, {"service_tier": "flex"}, {"parallel_tool_calls": False},
     {"safety_identifier": "x"}, {"prompt_cache_key": "x"}, {"echo": False}, {"user": "somebody"}],
)  # fmt: skip
def test_a_parameter_that_changes_nothing_is_accepted(harmless: dict[str, Any]) -> None:
    assert _chat(**harmless).sampling_params(0, 0) == _chat().sampling_params(0, 0)
    assert _completion(**harmless).sampling_params(0, 0) == _completion().sampling_params(0, 0)


@pytest.mark.parametrize(
    "unsupported",
    [{"tools": [{}]}, {"tool_choice": "required"}, {"response_format": {"type": "json_object"}}, {"audio": {}},
     {"modalities": ["audio"]}, {"echo": True}, {"best_of": 2}, {"suffix": "x"}, {"reasoning_effort": "low"}],
)  # fmt: skip
def test_a_parameter_that_would_change_the_answer_is_rejected_by_name(unsupported: dict[str, Any]) -> None:
    for endpoint in (_chat, _completion):
        with pytest.raises(ValidationError, match=f"{next(iter(unsupported))} is not supported"):
            endpoint(**unsupported)


@pytest.mark.parametrize(
    ("good", "bad"),
    [({"n": 64}, {"n": 65}), ({"temperature": 2}, {"temperature": 2.01}), ({"top_p": 1}, {"top_p": 1.01}),
     ({"logprobs": True, "top_logprobs": 20}, {"logprobs": True, "top_logprobs": 21}),
     ({"logit_bias": {"1": 100}}, {"logit_bias": {"1": 101}}), ({"logit_bias": {"1": 1}}, {"logit_bias": {"²": 1}}),
     ({"logit_bias": {"999999999": 1}}, {"logit_bias": {"1000000000": 1}}), ({"max_tokens": 1}, {"max_tokens": 0}),
     ({"presence_penalty": 2}, {"presence_penalty": 2.1}), ({"frequency_penalty": -2}, {"frequency_penalty": -2.1}),
     ({"stop": ["x"] * 16}, {"stop": ["x"] * 17}), ({"seed": 2**63 - 1}, {"seed": 2**63}),
     ({"stream": True, "stream_options": {}}, {"stream": False, "stream_options": {}}),
     ({"logit_bias": {"1": 1}}, {"logit_bias": {"1": float("nan")}}), ({}, {"temperature": float("nan")})],
)  # fmt: skip
def test_bounds_are_inclusive(good: dict[str, Any], bad: dict[str, Any]) -> None:
    _chat(**good)
    with pytest.raises(ValidationError):
        _chat(**bad)


def test_prompts_are_texts_or_tokens() -> None:
    assert _completion(prompt=[3, 4]).prompts() == [[3, 4]]
    assert _completion(prompt=[[3, 4], [5]]).prompts() == [[3, 4], [5]]
    assert _completion(prompt=["a", "b"]).prompts() == ["a", "b"]
    invalid: list[Any] = [[], [[]], [-1], [[1], "a"], [1, "a"]]
    for prompt in invalid:
        with pytest.raises(ValidationError):
            _completion(prompt=prompt)
