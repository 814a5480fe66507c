"""Answers over the wire, asked by the real openai client: they are those of the model, whoever else is in the batch."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import openai
import pytest
import torch

from personalized_soups.declare.profile import Profile
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.web.settings import Rules, Settings
from tests.serving.servers import RunningServer, running, send_raw

WARM = {"weights": {"warm": 1.5, "cold": -0.5}}
PLAIN = {"weights": {"plain": 2.0}}
PROMPT = "wash the old kettle"


def _chat(served: RunningServer, prompt: str = PROMPT, *, model: str = "small", **options: Any) -> Any:
    given = {"temperature": 0, "max_tokens": 12, **options}
    messages: Any = [{"role": "user", "content": prompt}]
    return served.client().chat.completions.create(model=model, messages=messages, **given)


def _solo(served: RunningServer, profile: Any, prompt: str = PROMPT, **options: Any) -> str:
    answer: str = served.model.generate([prompt], [profile], **{"max_new_tokens": 12, **options})[0]
    return answer


def _content(answer: Any) -> str:
    return str(answer.choices[0].message.content)


def test_an_answer_is_the_models_own_for_base_inline_and_stored_profiles(served: RunningServer) -> None:
    assert served.store is not None
    served.store.put(Profile(user="ada", weights=PLAIN["weights"]))
    served.store.put(Profile(user="ada", weights=WARM["weights"]))
    base, warm, plain = (_solo(served, who) for who in (None, WARM["weights"], PLAIN["weights"]))
    assert len({base, warm, plain}) == 3  # else nothing is shown
    assert _content(_chat(served)).strip() == base
    assert _content(_chat(served, extra_body={"profile": WARM})).strip() == warm
    assert _content(_chat(served, model="soup:ada")).strip() == warm
    first = _chat(served, model="soup:ada@1")
    assert _content(first).strip() == plain
    assert first.model == "soup:ada@1"
    assert _chat(served, model="soup:ada").model == "soup:ada@2"


def test_usage_and_finish_reasons_are_told(served: RunningServer) -> None:
    answer = _chat(served, max_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert answer.usage.prompt_tokens == len(served.model.generator.encoded(PROMPT))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 5
    whole = _content(_chat(served))
    stop = whole[4:6]
    stopped = _chat(served, stop=["never there", stop])
    assert _content(stopped) == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_an_answer_that_ends_by_itself_says_stop_and_its_end_token_is_counted(served: RunningServer) -> None:
    end = served.model.tokenizer.eos_token_id  # type: ignore[union-attr]
    answer = _chat(served, logit_bias={str(end): 100}, logprobs=True)
    assert (_content(answer), answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("", "stop", 1)
    assert answer.choices[0].logprobs.content == []


def test_a_stream_is_the_answer_in_parts(served: RunningServer) -> None:
    whole = _chat(served, extra_body={"profile": WARM}, max_tokens=20)
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}, "max_tokens": 20}
    chunks = list(_chat(served, extra_body={"profile": WARM}, **options))
    *parts, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert parts[0].choices[0].delta.role == "assistant"
    texts = [part.choices[0].delta.content or "" for part in parts]
    assert "".join(texts) == _content(whole)
    assert sum(bool(text) for text in texts) > 5
    assert [part.choices[0].finish_reason for part in parts][-1] == "length"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in parts)


@pytest.mark.parametrize("temperature", [0.7, 1.3])
def test_the_same_seed_is_the_same_answer_and_the_models_own(served: RunningServer, temperature: float) -> None:
    answer = _chat(served, temperature=temperature, seed=11, n=3, extra_body={"profile": WARM})
    texts = [choice.message.content.strip() for choice in answer.choices]
    own = [
        served.model.generate(
            [PROMPT], [WARM["weights"]], max_new_tokens=12, temperature=temperature, seed=11, places=[place]
        )[0]
        for place in range(3)
    ]
    assert texts == own
    assert len(set(texts)) > 1


def test_without_a_seed_answers_differ(served: RunningServer) -> None:
    assert len({_content(_chat(served, temperature=1.5)) for _ in range(4)}) > 1


def test_log_probabilities_are_those_of_the_model_alone(served: RunningServer) -> None:
    answer = _chat(served, logprobs=True, top_logprobs=3, max_tokens=6, extra_body={"profile": WARM})
    output = answer.choices[0].logprobs.content
    tokens = served.model.generator.encoded(PROMPT)
    assert len(output) == 6
    for entry in output:
        with torch.no_grad(), served.model.mixture([WARM["weights"]]):
            logits_V = served.model(input_ids=torch.tensor([tokens])).logits[0, -1]
        want_V = torch.log_softmax(logits_V.double(), dim=-1)
        best = int(want_V.argmax())
        # float32 logits of a batch against those of a whole pass: a few rounding errors of numbers below 10
        assert math.isclose(entry.logprob, float(want_V[best]), abs_tol=1e-4)
        assert [round(other.logprob, 3) for other in entry.top_logprobs] == [
            round(value, 3) for value in want_V.topk(3).values.tolist()
        ]
        assert entry.token == served.model.tokenizer.decode([best])  # type: ignore[union-attr]
        tokens.append(best)


def test_completions_take_texts_and_tokens_and_lists_of_both(served: RunningServer) -> None:
    client = served.client()
    texts = ["wash the", "rub it dry with"]
    ids = [list(map(int, served.model.tokenizer(text)["input_ids"])) for text in texts]  # type: ignore[misc]
    by_text = client.completions.create(model="small", prompt=texts, max_tokens=8, temperature=0)
    by_ids = client.completions.create(model="small", prompt=ids, max_tokens=8, temperature=0)
    assert [each.text for each in by_text.choices] == [each.text for each in by_ids.choices]
    assert [each.index for each in by_text.choices] == [0, 1]
    one = client.completions.create(model="small", prompt=ids[1], max_tokens=8, temperature=0, logprobs=2)
    assert one.choices[0].text == by_text.choices[1].text
    likely = one.choices[0].logprobs
    assert likely is not None
    assert likely.tokens is not None
    assert likely.text_offset is not None
    assert len(likely.tokens) == 8
    assert likely.text_offset[0] == 0
    pieces = client.completions.create(model="small", prompt=ids[1], max_tokens=8, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == one.choices[0].text
    with torch.no_grad():
        row = served.model.model.generate(torch.tensor([ids[0]]), max_new_tokens=8, do_sample=False)[0, len(ids[0]) :]
    want = served.model.tokenizer.decode(row.tolist(), skip_special_tokens=True)  # type: ignore[union-attr]
    assert by_text.choices[0].text == want


def test_a_chat_is_a_conversation_and_its_parts_are_joined(served: RunningServer) -> None:
    messages: Any = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "wash "}, {"type": "text", "text": "it"}]},
        {"role": "assistant", "content": "rub it"},
        {"role": "user", "content": "and then?"},
    ]
    answer = served.client().chat.completions.create(model="small", messages=messages, temperature=0, max_tokens=6)
    same: Any = [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "wash it"},
        *messages[2:],
    ]
    assert _content(answer).strip() == served.model.generate([same], [None], max_new_tokens=6)[0]


def test_what_clients_send_beside_the_question_changes_no_answer(served: RunningServer) -> None:
    noted: dict[str, Any] = {
        "prompt_cache_retention": "24h", "prompt_cache_options": None, "moderation": None, "safety_identifier": "u",
        "messages": [{"role": "user", "content": PROMPT, "id": 1}],
    }  # fmt: skip
    assert _content(_chat(served, extra_body=noted)) == _content(_chat(served))


def test_many_users_at_once_get_each_their_solo_answer(served: RunningServer) -> None:
    users = [(f"wash the {'old ' * (place % 5)}kettle", {"warm": 0.25 * place, "plain": 1.0}) for place in range(24)]
    solo = [_content(_chat(served, prompt, extra_body={"profile": {"weights": w}})) for prompt, w in users]
    assert len(set(solo)) > 12

    async def ask(client: openai.AsyncOpenAI, prompt: str, weights: dict[str, float], place: int) -> str:
        await asyncio.sleep(0.003 * (place % 7))  # some join while others run
        messages: Any = [{"role": "user", "content": prompt}]
        stream = await client.chat.completions.create(
            model="small", messages=messages, temperature=0, max_tokens=12, stream=True,
            extra_body={"profile": {"weights": weights}},
        )  # fmt: skip
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    async def everybody() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, *user, place) for place, user in enumerate(users)))

    assert asyncio.run(everybody()) == solo
    served.wait_until(served.is_idle)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl_reads_the_stream(served: RunningServer) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "stream": True,
            "max_tokens": 6, "profile": WARM}  # fmt: skip
    command = ["curl", "-sN", "-i", f"{served.url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    out = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, check=True).stdout
    head, _, events = out.partition("\n\n")
    assert "text/event-stream" in head
    lines = [line.removeprefix("data: ") for line in events.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    text = "".join(json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1])
    assert text.strip() == _solo(served, WARM["weights"], max_new_tokens=6)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_frees_its_row(served: RunningServer, stream: bool) -> None:
    body = {"model": "small", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 230, "stream": stream,
            "logit_bias": {str(served.model.tokenizer.eos_token_id): -100}}  # type: ignore[union-attr]  # fmt: skip
    before = served.server.metrics.registry.get_sample_value("psoups_answer_tokens_total") or 0.0
    sent = send_raw(served.port, "/v1/chat/completions", body)
    served.wait_until(lambda: served.server.batcher.load.running == 1)
    sent.close()
    served.wait_until(served.is_idle)
    after = served.server.metrics.registry.get_sample_value("psoups_answer_tokens_total") or 0.0
    assert after - before < 230


def test_characters_of_four_bytes_and_controls_survive(served: RunningServer) -> None:
    prompt = "😀\u0007\u0000 \u202e été\r\n\t\U0001d518"
    assert _content(_chat(served, prompt)).strip() == _solo(served, None, prompt)
    assert _content(_chat(served, stop=["😀"])) == _content(_chat(served))


def test_faults_are_the_clients_own_exceptions(served: RunningServer) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist") as unknown:
        _chat(served, model="gpt-4")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as nobody:
        _chat(served, model="soup:nobody")
    assert nobody.value.code == "profile_not_found"
    with pytest.raises(openai.NotFoundError):
        _chat(served, model="soup:")
    with pytest.raises(openai.UnprocessableEntityError, match=r"'wam'.*did you mean 'warm'"):
        _chat(served, extra_body={"profile": {"weights": {"wam": 1.0}}})
    with pytest.raises(openai.UnprocessableEntityError, match="ties"):
        _chat(served, extra_body={"profile": {"weights": {"warm": 1.0}, "method": "ties"}})
    with pytest.raises(openai.BadRequestError, match="weights"):
        _chat(served, extra_body={"profile": {"weights": {}}})
    with pytest.raises(openai.BadRequestError, match="did you mean 'stop'"):
        _chat(served, extra_body={"stopp": "x"})
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        _chat(served, tools=[{"type": "function", "function": {"name": "f"}}])
    with pytest.raises(openai.BadRequestError, match="maximum context length is 256") as long:
        _chat(served, "wash " * 400)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="no token 9999999"):
        _chat(served, logit_bias={"9999999": 1})
    with pytest.raises(openai.BadRequestError, match="no token 320000"):
        served.client().completions.create(model="small", prompt=[320000])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 2}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages.0.role"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"profile": []}, "profile"),
        ({"moderation": {"model": "omni"}}, "moderation"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{"id": "c"}]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ],
)
def test_values_that_cannot_be_are_told_by_name(served: RunningServer, body: dict[str, Any], param: str | None) -> None:
    asked = {"model": "small", "messages": [{"role": "user", "content": "x"}], **body}
    reply = served.ask("POST", "/v1/chat/completions", asked)
    assert reply.status == 400
    assert reply.error["type"] == "invalid_request_error"
    assert reply.error["param"] == param


@pytest.mark.parametrize(
    "body",
    [b"{", b"", b"[]", b"\xff\xfe", b'{"model": "small", "messages": [], "temperature": NaN}', b'{"a": 1e999}',
     b'{"model": "\\ud800"}', b"nul\x00l", b"[" * 100_000],
)  # fmt: skip
def test_what_is_no_json_is_a_400(served: RunningServer, body: bytes) -> None:
    reply = served.ask("POST", "/v1/chat/completions", body)
    assert reply.status == 400
    assert reply.error["message"]


def test_a_request_may_be_a_form_to_nobody(served: RunningServer) -> None:
    for path, more in (
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
        ("completions", {"prompt": "x"}),
    ):
        body = {"model": "small", "max_tokens": 1, **more}
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
            reply = served.ask("POST", f"/v1/{path}", body, {"Content-Type": kind})
            assert (reply.status, "application/json" in reply.error["message"]) == (400, True)
        assert (
            served.ask("POST", f"/v1/{path}", body, {"Content-Type": "Application/JSON; charset=utf-8"}).status == 200
        )


def test_unknown_addresses_and_methods_are_told_in_the_same_form(served: RunningServer) -> None:
    assert served.ask("GET", "/v2/nothing").error["message"] == "Unknown request URL: GET /v2/nothing"
    assert served.ask("DELETE", "/v1/chat/completions").status == 405


def test_a_stored_profile_is_a_model_and_goes_with_no_other(served: RunningServer) -> None:
    assert served.store is not None
    served.store.put(Profile(user="bea", weights=WARM["weights"]))
    assert {"small", "soup:bea"} <= {each.id for each in served.client().models.list()}
    for name in ("soup:bea", "soup:bea@1"):
        assert served.client().models.retrieve(name).id == name
    for name in ("soup:bea@2", "soup:bea@0", "soup:bea@"):
        with pytest.raises(openai.NotFoundError):
            served.client().models.retrieve(name)
    for profile in (PLAIN, {}):
        with pytest.raises(openai.BadRequestError, match="gives another") as both:
            _chat(served, model="soup:bea", extra_body={"profile": profile})
        assert both.value.param == "profile"


def test_only_digits_of_ours_are_a_version(served: RunningServer) -> None:
    assert served.store is not None
    served.store.put(Profile(user="cy@\u0661", weights=PLAIN["weights"]))
    assert _chat(served, model="soup:cy@\u0661").model == "soup:cy@\u0661@1"


def test_what_is_wrong_with_a_profile_of_the_moment_is_told_at_it(served: RunningServer) -> None:
    for weights, status in (({"wam": 1.0}, 422), ({}, 400)):
        body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "profile": {"weights": weights}}
        reply = served.ask("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.error["param"]) == (status, "profile")
    for number in (b"NaN", b"Infinity", b"-Infinity"):
        raw = (
            b'{"model": "small", "messages": [{"role": "user", "content": "x"}], "profile": {"weights": {"warm": %s}}}'
        )
        reply = served.ask("POST", "/v1/chat/completions", raw % number)
        assert (reply.status, reply.error["code"]) == (400, "invalid_json")


def test_a_name_that_is_not_known_is_told_before_one_that_lacks(served: RunningServer) -> None:
    reply = served.ask("POST", "/v1/chat/completions", {"model": "small", "mesages": []})
    assert (reply.error["code"], reply.error["param"]) == ("unknown_parameter", "mesages")
    assert "did you mean 'messages'" in reply.error["message"]
    lacks = served.ask("POST", "/v1/chat/completions", {"model": "small"})
    assert (lacks.error["code"], lacks.error["param"]) == ("missing_required_parameter", "messages")


def test_models_are_listed(served: RunningServer) -> None:
    client = served.client()
    assert next(iter(client.models.list())).id == "small"
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_more_than_may_wait_is_refused_with_a_time_to_come_back(
    small_base: Path, expert_folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings("small", limits=Limits(max_rows=1, max_waiting=1, max_context=256))
    body = {"model": "small", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 200, "stream": True,
            "logit_bias": {"1": -100}}  # fmt: skip
    with running(small_base, expert_folders, settings) as served:
        first = send_raw(served.port, "/v1/chat/completions", body)
        served.wait_until(lambda: served.server.batcher.load.running == 1)
        second = send_raw(served.port, "/v1/chat/completions", body)
        served.wait_until(lambda: served.server.batcher.load.waiting == 1)
        monkeypatch.setattr(served.server.batcher, "retry_after", lambda: 7)
        with pytest.raises(openai.RateLimitError) as full:
            _chat(served)
        assert full.value.response.headers["retry-after"] == "7"
        assert full.value.code == "queue_full"
        second.close()  # one that waits, too
        served.wait_until(lambda: served.server.batcher.load.waiting == 0)
        first.close()
        served.wait_until(served.is_idle)


def test_a_request_that_takes_too_long_is_ended(small_base: Path, expert_folders: Path) -> None:
    settings = Settings("small", limits=Limits(max_context=256), request_seconds=0.05)
    long: dict[str, Any] = {"max_tokens": 200, "logit_bias": {"1": -100}}
    with running(small_base, expert_folders, settings) as served:
        with pytest.raises(openai.InternalServerError, match=r"not complete within 0\.05 s") as late:
            _chat(served, **long)
        assert late.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"not complete within 0\.05 s"):
            list(_chat(served, stream=True, **long))
        served.wait_until(served.is_idle)


def test_too_many_requests_at_once_are_refused(small_base: Path, expert_folders: Path) -> None:
    settings = Settings("small", rules=Rules(max_requests=1), limits=Limits(max_context=256))
    body = {"model": "small", "messages": [{"role": "user", "content": PROMPT}], "max_tokens": 200, "stream": True,
            "logit_bias": {"1": -100}}  # fmt: skip
    with running(small_base, expert_folders, settings) as served:
        first = send_raw(served.port, "/v1/chat/completions", body)
        served.wait_until(lambda: served.server.batcher.load.running == 1)
        refused = served.ask("GET", "/v1/models")
        assert refused.status == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert served.ask("GET", "/health").status == 200
        first.close()
        served.wait_until(served.is_idle)
        assert served.ask("GET", "/v1/models").status == 200
