"""The exact form of answers where the openai client would hide it: streams, usage, limits, offsets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.types import Receive

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.engine.request import Finish, GenerationRequest, Piece
from personalized_soups.serving.engine.token_sampler import TokenLogprobs
from personalized_soups.serving.protocol.event_stream import EventStream
from personalized_soups.serving.protocol.faults import ApiError
from personalized_soups.serving.protocol.formats import PendingChat, PendingCompletion
from personalized_soups.serving.protocol.piece_queue import ClientDisconnectedError
from personalized_soups.serving.protocol.profile_resolver import ResolvedProfile
from personalized_soups.serving.protocol.requests import ChatRequest, CompletionRequest
from personalized_soups.serving.web.settings import Settings
from tests.serving.servers import RunningServer, running

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
NO_END = {"logit_bias": {"1": -100}}  # never choose the end token of the small base


def _chat(text: str = "wash it", **options: Any) -> dict[str, Any]:
    return {"model": "small", "messages": [{"role": "user", "content": text}], "temperature": 0, **NO_END, **options}


def _completion(prompt: Any = "wash the", **options: Any) -> dict[str, Any]:
    return {"model": "small", "prompt": prompt, "temperature": 0, **NO_END, **options}


def _whole(served: RunningServer, path: str, body: dict[str, Any]) -> Any:
    reply = served.ask("POST", path, body)
    assert reply.status == 200, reply.body
    return reply.json


def _events(body: bytes) -> list[Any]:
    """Return the events of a stream, which ends with exactly one [DONE]."""
    *lines, done, rest = body.decode().split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    assert all(line.startswith("data: ") and "\n" not in line for line in lines)
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_stream_has_the_protocols_form(served: RunningServer) -> None:
    body = _chat(temperature=1.2, seed=4, n=2, max_tokens=9)
    whole = _whole(served, CHAT, body)
    reply = served.ask("POST", CHAT, {**body, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert (reply.headers["cache-control"], reply.headers["x-accel-buffering"]) == ("no-cache", "no")
    *parts, last = _events(reply.body)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(part["usage"] is None and len(part["choices"]) == 1 for part in parts)
    same = ("id", "created", "model", "object", "system_fingerprint")
    assert len({tuple(part[name] for name in same) for part in [*parts, last]}) == 1
    assert (last["object"], whole["object"]) == ("chat.completion.chunk", "chat.completion")
    for index, choice in enumerate(whole["choices"]):
        own = [part["choices"][0] for part in parts if part["choices"][0]["index"] == index]
        assert choice["index"] == index
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert ["role" in each["delta"] for each in own].count(True) == 1
        assert "".join(each["delta"].get("content", "") for each in own) == choice["message"]["content"]
        assert [each["finish_reason"] for each in own] == [None] * (len(own) - 1) + [choice["finish_reason"]]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]  # equal answers would hide a mix-up


def test_a_stream_has_usage_only_on_request(served: RunningServer) -> None:
    for path, body in ((CHAT, _chat(max_tokens=3)), (COMPLETIONS, _completion(max_tokens=3))):
        for options in ({}, {"stream_options": {"include_usage": False}}):
            events = _events(served.ask("POST", path, {**body, "stream": True, **options}).body)
            assert not any("usage" in event for event in events)
            assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_an_end_without_text_has_an_empty_delta(served: RunningServer) -> None:
    body = _chat(logit_bias={"1": 100}, stream=True)
    role, end = (event["choices"][0] for event in _events(served.ask("POST", CHAT, body).body))
    assert role["delta"]["role"] == "assistant"
    assert (end["delta"], end["finish_reason"]) == ({}, "stop")


def test_usage_counts_each_prompt_once_and_all_answers(served: RunningServer) -> None:
    one = _whole(served, CHAT, _chat(max_tokens=5))["usage"]
    assert _whole(served, CHAT, _chat(max_tokens=5, n=3))["usage"] == {
        "prompt_tokens": one["prompt_tokens"], "completion_tokens": 15, "total_tokens": one["prompt_tokens"] + 15,
    }  # fmt: skip
    ids = [[7, 8, 9], [10, 11]]
    body = _completion(ids, max_tokens=4, n=2)
    usage = {"prompt_tokens": 5, "completion_tokens": 16, "total_tokens": 21}
    assert _whole(served, COMPLETIONS, body)["usage"] == usage
    streamed = {**body, "stream": True, "stream_options": {"include_usage": True}}
    assert _events(served.ask("POST", COMPLETIONS, streamed).body)[-1]["usage"] == usage


def test_answers_to_several_prompts_are_ordered_by_prompt(served: RunningServer) -> None:
    prompts = ["wash the", "rub it dry with"]
    first, second = (
        _whole(served, COMPLETIONS, _completion(each, max_tokens=6))["choices"][0]["text"] for each in prompts
    )
    assert first != second
    choices = _whole(served, COMPLETIONS, _completion(prompts, max_tokens=6, n=2))["choices"]
    assert [each["text"] for each in choices] == [first, first, second, second]
    assert [each["index"] for each in choices] == [0, 1, 2, 3]


def test_answers_have_default_length_limits(served: RunningServer) -> None:
    assert _whole(served, CHAT, _chat())["usage"]["completion_tokens"] == 24  # the default of the server
    assert _whole(served, COMPLETIONS, _completion())["usage"]["completion_tokens"] == 16  # the default of the protocol
    newer = _chat(max_completion_tokens=2, max_tokens=7)
    assert _whole(served, CHAT, newer)["usage"]["completion_tokens"] == 2


def test_prompt_and_answer_may_fill_the_context_and_no_more(served: RunningServer) -> None:
    ids = [7] * 250
    assert _whole(served, COMPLETIONS, _completion(ids, max_tokens=6))["usage"]["total_tokens"] == 256
    encoded = served.model.generator.encoded
    # a chat without a limit may fill the context, and gets at least one token
    for left in (3, 1):
        text = next(text for text in ("~" * size for size in range(256)) if len(encoded(text)) == 256 - left)
        assert _whole(served, CHAT, _chat(text))["usage"]["completion_tokens"] == left
    for path, body, param in (
        (COMPLETIONS, _completion(ids, max_tokens=7), "max_tokens"),
        (CHAT, _chat(max_tokens=256), "max_tokens"),
        (CHAT, _chat(text + "~"), "messages"),
        (COMPLETIONS, _completion([7] * 256), "prompt"),
    ):
        reply = served.ask("POST", path, body)
        assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "context_length_exceeded", param)


def test_the_first_unknown_token_id_is_rejected(served: RunningServer) -> None:
    size = len(served.model.tokenizer)  # type: ignore[arg-type]
    _whole(served, COMPLETIONS, _completion([size - 1], max_tokens=1, logit_bias={str(size - 1): -1}))
    for body, param in (
        (_completion([7, size]), "prompt"),
        (_completion([7], logit_bias={str(size): 1}), "logit_bias"),
        (_completion(""), "prompt"),
        (_completion(["x", ""]), "prompt"),
        (_completion([]), "prompt"),
    ):
        reply = served.ask("POST", COMPLETIONS, body)
        assert (reply.status, reply.error["param"].split(".")[0]) == (400, param), reply.body


def test_the_default_temperature_is_1(served: RunningServer) -> None:
    def answer(**options: Any) -> str:
        body = {"model": "small", "messages": [{"role": "user", "content": "wash it"}], "seed": 6, **NO_END, **options}
        return str(_whole(served, CHAT, body)["choices"][0]["message"]["content"])

    assert answer() == answer(temperature=1, top_p=1, n=None) != answer(temperature=0)


@pytest.mark.parametrize("stop", [None, ["e x", " t", "a b"]])
def test_a_stream_has_the_log_probabilities_of_a_whole_response(served: RunningServer, stop: list[str] | None) -> None:
    body = _completion(temperature=1.5, seed=3, logprobs=2, max_tokens=30, stop=stop)
    whole = _whole(served, COMPLETIONS, body)["choices"][0]["logprobs"]
    streamed: dict[str, list[Any]] = {name: [] for name in whole}
    for event in _events(served.ask("POST", COMPLETIONS, {**body, "stream": True}).body):
        for name, values in (event["choices"][0]["logprobs"] or {}).items():
            streamed[name] += values
    assert streamed["tokens"] == whole["tokens"]
    assert streamed["text_offset"] == whole["text_offset"]
    assert whole["text_offset"] == [sum(map(len, whole["tokens"][:place])) for place in range(len(whole["tokens"]))]
    assert streamed["token_logprobs"] == pytest.approx(whole["token_logprobs"])
    assert all(len(each) <= 2 for each in whole["top_logprobs"])


def test_a_time_limit_before_the_first_event_is_an_error_with_its_status(
    small_base: Path, expert_folders: Path
) -> None:
    settings = Settings("small", limits=Limits(max_context=256), request_seconds=0.0)
    with running(small_base, expert_folders, settings) as served:
        for stream in (False, True):
            reply = served.ask("POST", CHAT, _chat(stream=stream))
            assert (reply.status, reply.error["code"], reply.error["type"]) == (504, "timeout", "server_error")
            assert reply.headers["content-type"] == "application/json"
        served.wait_until(served.is_idle)
        page = served.ask("GET", "/metrics").body.decode()
        assert "psoups_request_seconds_count 2.0" in page  # failed requests count
        assert "psoups_time_to_first_token_seconds_count 0.0" in page


class _Tokenizer:
    def decode(self, tokens: Sequence[int], **_: Any) -> str:
        return {3: "\ufffd", 4: "é"}.get(tokens[0], f"t{tokens[0]}")


def _context() -> Any:
    return SimpleNamespace(
        generator=SimpleNamespace(tokenizer=_Tokenizer(), stop_ids={1}), files=SimpleNamespace(fingerprint="f")
    )


class _Pending(PendingChat):
    """One answer with given pieces, and an error after them."""

    source: tuple[list[Piece], Exception]

    async def pieces(self, receive: Receive) -> AsyncGenerator[Sequence[tuple[int, Piece]]]:
        for piece in self.source[0]:
            yield [(0, piece)]
        raise self.source[1]


def _sent(pieces: list[Piece], error: Exception) -> list[Any]:
    """Return the ASGI messages of a stream that ends with an error."""
    body = ChatRequest.model_validate({"model": "m", "messages": [{"role": "user", "content": "x"}], "stream": True})
    pending = _Pending(
        _context(),
        body,
        ResolvedProfile(ExpertWeights(), "base", None, "m"),
        [GenerationRequest([1], ExpertWeights(), 4)],
        1,
        0.0,
    )
    object.__setattr__(pending, "source", (pieces, error))
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(EventStream(pending, receive)({"type": "http"}, receive, send))
    return sent


def test_an_error_after_the_first_event_is_the_last_event() -> None:
    start, *bodies = _sent([Piece(5, "a")], ApiError(422, "it broke", code="odd"))
    assert start["status"] == 200
    assert [each["more_body"] for each in bodies] == [True] * (len(bodies) - 1) + [False]
    events = _events(b"".join(each["body"] for each in bodies))
    assert [event["choices"][0]["delta"].get("content") for event in events[:-1]] == ["", "a"]
    assert events[-1] == {"error": {"message": "it broke", "type": "invalid_request_error", "param": None,
                                    "code": "odd"}}  # fmt: skip


def test_an_error_before_the_first_event_is_raised() -> None:
    with pytest.raises(ApiError, match="it broke"):
        _sent([], ApiError(422, "it broke"))


def test_nothing_is_sent_after_a_disconnection() -> None:
    assert _sent([], ClientDisconnectedError()) == []
    messages = _sent([Piece(5, "a")], ClientDisconnectedError())
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in messages)


def test_only_whole_characters_have_bytes() -> None:
    body = ChatRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 1}
    )
    pending = PendingChat(_context(), body, ResolvedProfile(ExpertWeights(), "base", None, "m"), [], 1, 0.0)
    content = pending.logprobs([(3, TokenLogprobs(-1.0, ((4, -0.5),)))], 0)["content"]
    assert content == [
        {"token": "\ufffd", "logprob": -1.0, "bytes": None,
         "top_logprobs": [{"token": "é", "logprob": -0.5, "bytes": [0xC3, 0xA9]}]}
    ]  # fmt: skip


def test_end_tokens_have_no_log_probabilities() -> None:
    body = CompletionRequest.model_validate({"model": "m", "prompt": "x", "logprobs": 0})
    pending = PendingCompletion(_context(), body, ResolvedProfile(ExpertWeights(), "base", None, "m"), [], 1, 0.0)
    logprobs = TokenLogprobs(-1.0, ())
    assert pending.logprobs_of(Piece(1, "", logprobs, Finish.STOP)) == []
    assert pending.logprobs_of(Piece(5, "t5", logprobs)) == [(5, logprobs)]
    assert pending.logprobs_of(Piece(5, "t5")) == []
    assert pending.logprobs([(5, logprobs), (4, logprobs)], 10) == {
        "tokens": ["t5", "é"], "token_logprobs": [-1.0, -1.0], "top_logprobs": [None, None], "text_offset": [10, 12],
    }  # fmt: skip
