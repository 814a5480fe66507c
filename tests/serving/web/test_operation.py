"""Health, readiness and metrics; the server's own description, tried against it with thousands of odd requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from personalized_soups.declare.expert_weights import ExpertWeights
from personalized_soups.declare.profile import Profile
from personalized_soups.errors import UsageError
from personalized_soups.serving.engine.batcher import Load
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.protocol.metrics import CONTENT_TYPE, Metrics
from personalized_soups.serving.protocol.profile_resolver import ResolvedProfile
from personalized_soups.serving.web.server import cache_bytes, config_of, context_of
from personalized_soups.serving.web.settings import Settings
from tests.serving.servers import RunningServer, running
from tests.serving.web.routes.pools import pool_of


def _value(served: RunningServer, name: str, **labels: str) -> float:
    text = served.ask("GET", "/metrics").body.decode()
    output = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = re.search(rf"^psoups_{name}{re.escape('{' + output + '}') if output else ''} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _ask(served: RunningServer, model: str = "small", **options: Any) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "wash"}], "max_tokens": 5, "temperature": 0,
            "logit_bias": {"1": -100}, **options}  # fmt: skip
    assert served.ask("POST", "/v1/chat/completions", body).status == 200


def test_the_metrics_count_what_happens(served: RunningServer) -> None:
    assert served.store is not None
    served.store.put(Profile(user="somebody secret", weights={"warm": 1.0}))
    counted = {
        "answer_tokens_total": 15, "prompt_tokens_total": 3 * len(served.model.generator.encoded("wash")),
        "time_to_first_token_seconds_count": 3, "request_seconds_count": 3,
    }  # fmt: skip
    before = {name: _value(served, name) for name in counted}
    kinds = {kind: _value(served, "answers_total", profile=kind) for kind in ("base", "inline", "stored")}
    requests = _value(served, "requests_total", route="/v1/chat/completions", status="200")
    _ask(served)
    _ask(served, profile={"weights": {"warm": 1.0}})
    _ask(served, "soup:somebody secret")
    assert {name: _value(served, name) - before[name] for name in counted} == counted
    for kind, old in kinds.items():
        assert _value(served, "answers_total", profile=kind) == old + 1
    assert _value(served, "requests_total", route="/v1/chat/completions", status="200") == requests + 3
    assert _value(served, "waiting_answers") == _value(served, "running_answers") == 0
    assert _value(served, "step_rows_count") > 0
    assert "secret" not in served.ask("GET", "/metrics").body.decode()
    served.ask("GET", "/v1/profiles/somebody%20secret")
    served.ask("GET", "/somebody%20secret")
    assert "secret" not in served.ask("GET", "/metrics").body.decode()


def test_several_answers_to_a_request_are_each_counted_and_their_prompt_once(served: RunningServer) -> None:
    counted = {
        "answer_tokens_total": 15, "prompt_tokens_total": len(served.model.generator.encoded("wash")),
        "time_to_first_token_seconds_count": 3, "request_seconds_count": 1,
    }  # fmt: skip
    before = {name: _value(served, name) for name in counted}
    answers = _value(served, "answers_total", profile="base")
    _ask(served, n=3)
    assert {name: _value(served, name) - before[name] for name in counted} == counted
    assert _value(served, "answers_total", profile="base") == answers + 3
    page = served.ask("GET", "/metrics")
    assert page.headers["content-type"] == CONTENT_TYPE


def test_gauges_tell_what_is_going_on_now() -> None:
    metrics = Metrics(8, by_user=True)

    def output(name: str, **labels: str) -> float | None:
        return metrics.registry.get_sample_value(f"psoups_{name}", labels)

    metrics.step(4, 0.5)
    metrics.page(Load(waiting=3, running=2, cache_bytes=77, seconds_per_answer=1.0))
    assert (output("waiting_answers"), output("running_answers"), output("cache_bytes")) == (3, 2, 77)
    assert output("batch_occupancy") == 0.25
    assert output("answer_tokens_per_second") == pytest.approx(0.05 * 4 / 0.5)
    assert (output("step_rows_sum"), output("step_seconds_sum"), output("answer_tokens_total")) == (4, 0.5, 4)
    metrics.page(Load(waiting=0, running=0, cache_bytes=0, seconds_per_answer=1.0))
    assert output("answer_tokens_per_second") == 0
    metrics.submitted(ResolvedProfile(ExpertWeights(), "base", None, "m"), 2, 9)
    metrics.submitted(ResolvedProfile(ExpertWeights(), "stored", "ada", "soup:ada@1"), 3, 5)
    assert (output("answers_total", profile="base"), output("answers_total", profile="stored")) == (2, 3)
    assert (output("user_answers_total", user="ada"), output("prompt_tokens_total")) == (3, 14)


def test_users_are_counted_by_name_where_that_is_asked_for(
    small_base: Path, expert_folders: Path, tmp_path: Path
) -> None:
    settings = Settings("small", limits=Limits(max_context=256), users_in_metrics=True)
    with running(small_base, expert_folders, settings, profiles=tmp_path / "p.db") as served:
        assert served.store is not None
        served.store.put(Profile(user='a"\n\\b', weights={"warm": 1.0}))
        _ask(served, 'soup:a"\n\\b', n=3)
        assert b'psoups_user_answers_total{user="a\\"\\n\\\\b"} 3.0' in served.ask("GET", "/metrics").body


def test_health_and_readiness(small_base: Path, expert_folders: Path) -> None:
    with running(small_base, expert_folders, Settings("small", limits=Limits(max_context=256))) as served:
        assert served.ask("GET", "/health").json == {"status": "ok"}
        assert served.ask("GET", "/ready").json == {"status": "ready"}
        served.server.batcher.close()
        assert served.ask("GET", "/health").status == 200
        assert served.ask("GET", "/ready").status == 503
        body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
        reply = served.ask("POST", "/v1/chat/completions", body)
        assert (reply.status, reply.error["code"]) == (503, "shutting_down")
        assert served.ask("POST", "/v1/experts/reload").status == 503


@pytest.fixture(scope="module")
def whole(small_base: Path, expert_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """Yield a server with all routes: it has a store and questions."""
    store = tmp_path_factory.mktemp("whole") / "profiles.db"
    settings = Settings("small", limits=Limits(max_rows=16, max_context=256), default_max_tokens=24)
    with running(small_base, expert_folders, settings, profiles=store, pool=pool_of(expert_folders)) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode))
def test_its_own_description_tried_against_it_brings_no_server_error(
    whole: RunningServer, mode: GenerationMode
) -> None:
    served = whole
    schema = schemathesis.openapi.from_url(f"{served.url}/openapi.json")
    seen: set[str] = set()
    for result in schema.get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr]
        seen.add(f"{operation.method.upper()} {operation.path}")

        @settings(
            max_examples=40, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            case.call_and_validate(checks=[not_a_server_error], timeout=250)

        with suppress(Unsatisfiable):  # nothing can be wrong with a request for /health
            run()
    asking = {f"{method} /v1/profiles/{{user}}/questions" for method in ("GET", "POST", "DELETE")}
    assert {"POST /v1/chat/completions", "PUT /v1/profiles/{user}", "POST /v1/experts/reload", *asking} <= seen
    served.wait_until(served.is_idle)
    _ask(served)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_that_loads_scripts_from_elsewhere_is_served(served: RunningServer, path: str) -> None:
    assert served.ask("GET", path).status == 404


def test_a_fault_of_the_servers_own_tells_nothing(served: RunningServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a secret")

    monkeypatch.setattr(served.model, "resolve", fail)
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "profile": {"weights": {"warm": 1}}}
    reply = served.ask("POST", "/v1/chat/completions", body)
    assert (reply.status, reply.error["code"], b"secret" in reply.body) == (500, "internal_error", False)
    assert reply.headers["content-security-policy"]


def test_a_method_that_is_not_allowed_tells_those_that_are(served: RunningServer) -> None:
    reply = served.ask("DELETE", "/v1/chat/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error["message"] == "The method DELETE is not allowed for /v1/chat/completions"


class _Base:
    """A base that can so much, on a device that is not there."""

    def __init__(self, most: int | None) -> None:
        self.max_position_embeddings = most
        self.model = self.config = self

    def get_text_config(self, *, decoder: bool) -> _Base:
        assert decoder
        return self


@pytest.mark.parametrize(
    ("most", "asked", "context"),
    [
        (256, None, 256),
        (256, 256, 256),
        (256, 64, 64),
        (1 << 17, None, 1 << 15),
        (1 << 17, 1 << 17, 1 << 17),
        (None, None, 1 << 15),
        (None, 9, 9),
    ],
)
def test_the_context_is_what_the_base_can_or_less(most: int | None, asked: int | None, context: int) -> None:
    base: Any = _Base(most)
    assert context_of(base, asked) == context


def test_more_than_the_base_can_is_refused() -> None:
    base: Any = _Base(256)
    with pytest.raises(UsageError, match="a context of 257 tokens is larger than the base's limit of 256 tokens"):
        context_of(base, 257)


def test_half_of_what_is_free_is_for_keys_and_values(monkeypatch: pytest.MonkeyPatch) -> None:
    output = ["MemTotal: 9000 kB\nMemFree: 100 kB\nMemAvailable:    3000 kB\n"]
    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", lambda *_, **__: output[0])
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 4000))
        assert cache_bytes(torch.device("cpu")) == 1500 * 1024
        assert cache_bytes(torch.device("cuda", 0)) == 500
        output[0] = ""  # another system
        assert cache_bytes(torch.device("cpu")) == 2 << 30


def test_running_answers_have_as_long_as_the_settings_say() -> None:
    server: Any = type("Fake", (), {"app": None, "settings": Settings("m", grace_seconds=23.4)})()
    config = config_of(server)
    # our deadline comes first, and sends them an error
    assert config.timeout_graceful_shutdown == 24 + 3
    assert (config.server_header, config.proxy_headers, config.access_log) == (False, False, False)
