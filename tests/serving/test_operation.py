"""Health, readiness and metrics; the server's own description, tried against it with thousands of odd requests."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from personalized_soups.declare.profile import Profile
from personalized_soups.serving.app import Settings
from personalized_soups.serving.batching.batcher import Limits
from tests.serving.servers import Running, running


def _value(served: Running, name: str, **labels: str) -> float:
    text = served.ask("GET", "/metrics").body.decode()
    told = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = re.search(rf"^psoups_{name}{re.escape('{' + told + '}') if told else ''} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _ask(served: Running, model: str = "small", **options: Any) -> None:
    body = {"model": model, "messages": [{"role": "user", "content": "wash"}], "max_tokens": 5, "temperature": 0,
            "logit_bias": {"1": -100}, **options}  # fmt: skip
    assert served.ask("POST", "/v1/chat/completions", body).status == 200


def test_the_metrics_count_what_happens(served: Running) -> None:
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


def test_users_are_counted_by_name_where_that_is_asked_for(
    small_base: Path, expert_folders: Path, tmp_path: Path
) -> None:
    settings = Settings("small", limits=Limits(max_context=256), users_in_metrics=True)
    with running(small_base, expert_folders, settings, profiles=tmp_path / "p.db") as served:
        assert served.store is not None
        served.store.put(Profile(user='a"\n\\b', weights={"warm": 1.0}))
        _ask(served, 'soup:a"\n\\b')
        assert b'psoups_user_answers_total{user="a\\"\\n\\\\b"} 1.0' in served.ask("GET", "/metrics").body


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


@pytest.mark.parametrize("mode", list(GenerationMode))
def test_its_own_description_tried_against_it_brings_no_server_error(served: Running, mode: GenerationMode) -> None:
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
            case.call_and_validate(checks=[not_a_server_error])

        with suppress(Unsatisfiable):  # nothing can be wrong with a request for /health
            run()
    assert {"POST /v1/chat/completions", "PUT /v1/profiles/{user}", "POST /v1/experts/reload"} <= seen
    served.wait_until(served.is_idle)
    _ask(served)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_that_loads_scripts_from_elsewhere_is_served(served: Running, path: str) -> None:
    assert served.ask("GET", path).status == 404
