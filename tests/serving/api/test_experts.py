"""/v1/experts, reloading what has changed on the disk, and /v1/scores."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load_data
from personalized_soups.serving.app import Settings
from personalized_soups.serving.batching.batcher import Limits
from personalized_soups.serving.scales import Scales
from tests.experts import write_expert, write_record
from tests.mixing.worlds import write_experts
from tests.serving.servers import Running, running, send_raw

CATALOGUE = load_data({
    "dimensions": {
        "heat": {
            "about": "How warm an answer is.",
            "scorer": {"kind": "markers", "high": ["dear"], "low": ["now"]},
            "sides": {
                "warm": {"label": "P1A", "instruction": "Be warm.", "end": "high"},
                "cold": {"label": "P1B", "instruction": "Be cold.", "end": "low"},
            },
        },
        "length": {
            "about": "How long it is.",
            "sides": {"long": {"label": "P2A", "instruction": "Be long.",
                               "scorer": {"kind": "length", "low": 1, "high": 9}}},
        },
    }
}, Catalogue, "catalogue")  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_experts(tmp_path / "experts")
    return tmp_path / "experts"


@pytest.fixture
def own(small_base: Path, folder: Path) -> Iterator[Running]:
    settings = Settings("small", limits=Limits(max_rows=2, max_context=256))
    with running(small_base, folder, settings, catalogue=CATALOGUE) as served:
        yield served


def _body(weights: dict[str, float] | None, **options: Any) -> dict[str, Any]:
    profile = {} if weights is None else {"profile": {"weights": weights}}
    messages = [{"role": "user", "content": "wash it"}]
    return {"model": "small", "messages": messages, "max_tokens": 8, "temperature": 0, **profile, **options}


def _said(served: Running, weights: dict[str, float] | None) -> str:
    reply = served.ask("POST", "/v1/chat/completions", _body(weights))
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["message"]["content"])


def test_experts_and_dimensions_are_listed_from_low_to_high(own: Running) -> None:
    told = own.ask("GET", "/v1/experts").json
    assert told["base"] == "small"
    assert [each["name"] for each in told["data"]] == ["cold", "plain", "warm"]
    warm = told["data"][2]
    assert (warm["dimension"], warm["side"], warm["about"], warm["rank"], warm["is_changed"]) == (
        "heat", "warm", "Be warm.", 3, False,
    )  # fmt: skip
    assert told["data"][1]["dimension"] is None
    assert told["dimensions"] == [
        {"name": "heat", "about": "How warm an answer is.", "sides": ["cold", "warm"], "experts": ["cold", "warm"],
         "is_scored": True}
    ]  # fmt: skip


def test_a_changed_expert_is_refused_until_it_is_reloaded(own: Running, folder: Path) -> None:
    before, other = _said(own, {"warm": 2.0}), _said(own, {"cold": 2.0})
    write_expert(folder / "new", seed=9)
    shutil.rmtree(folder / "warm")
    write_expert(folder / "warm", seed=77, rank=5, alpha=20)
    told = {each["name"]: each["is_changed"] for each in own.ask("GET", "/v1/experts").json["data"]}
    assert told == {"cold": False, "plain": False, "warm": True}
    refused = own.ask("POST", "/v1/chat/completions", _body({"warm": 2.0}))
    assert (refused.status, refused.error["code"]) == (503, "experts_changed")
    assert "'warm'" in refused.error["message"]
    assert _said(own, {"cold": 2.0}) == other  # those that have not changed are served
    assert own.ask("POST", "/v1/chat/completions", _body({"new": 1.0})).status == 422
    after = own.ask("POST", "/v1/experts/reload")
    assert [each["name"] for each in after.json["data"]] == ["cold", "new", "plain", "warm"]
    now = _said(own, {"warm": 2.0})
    assert now != before
    assert now.strip() == own.model.generate(["wash it"], [{"warm": 2.0}], max_new_tokens=8)[0]
    shutil.rmtree(folder / "new")
    assert own.ask("POST", "/v1/chat/completions", _body({"new": 1.0})).status == 503
    own.ask("POST", "/v1/experts/reload")
    assert own.ask("POST", "/v1/chat/completions", _body({"new": 1.0})).status == 422


def test_an_expert_that_is_damaged_is_not_loaded_and_the_old_ones_serve_on(own: Running, folder: Path) -> None:
    said = _said(own, {"cold": 2.0})
    (folder / "warm" / "adapter_model.safetensors").write_bytes(b"damaged")
    reply = own.ask("POST", "/v1/experts/reload")
    assert reply.status == 409
    assert "warm" in reply.error["message"]
    assert _said(own, {"cold": 2.0}) == said
    assert own.ask("POST", "/v1/chat/completions", _body({"warm": 2.0})).status == 503
    shutil.rmtree(folder)
    assert own.ask("POST", "/v1/experts/reload").status == 409
    assert own.ask("POST", "/v1/chat/completions", _body(None)).status == 200


def test_a_reload_waits_for_running_answers_which_stay_what_they_were(own: Running, folder: Path) -> None:
    long = _body({"warm": 2.0}, max_tokens=200, logit_bias={"1": -100})
    want = own.ask("POST", "/v1/chat/completions", long).json["choices"][0]["message"]["content"]
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(own.ask("POST", "/v1/chat/completions", long)))
    asking.start()
    own.wait_until(lambda: own.server.batcher.load.running == 1)
    shutil.rmtree(folder / "warm")
    write_expert(folder / "warm", seed=77, rank=5, alpha=20)
    assert own.ask("POST", "/v1/experts/reload").status == 200
    asking.join(30)
    assert found[0].json["choices"][0]["message"]["content"] == want
    assert own.ask("POST", "/v1/chat/completions", long).json["choices"][0]["message"]["content"] != want


def test_those_who_wait_for_an_expert_that_goes_are_told(own: Running, folder: Path) -> None:
    long = _body({"warm": 2.0}, max_tokens=200, logit_bias={"1": -100}, n=2)
    first = send_raw(own.port, "/v1/chat/completions", long)
    own.wait_until(lambda: own.server.batcher.load.running == 2)
    found: list[Any] = []
    asking = threading.Thread(
        target=lambda: found.append(own.ask("POST", "/v1/chat/completions", _body({"warm": 1.0})))
    )
    asking.start()
    own.wait_until(lambda: own.server.batcher.load.waiting == 1)
    shutil.rmtree(folder / "warm")
    assert own.ask("POST", "/v1/experts/reload").status == 200
    asking.join(30)
    assert found[0].status == 422
    assert "'warm'" in found[0].error["message"]
    first.close()


def test_answers_are_scored_in_each_dimension_that_has_a_scorer(own: Running) -> None:
    reply = own.ask("POST", "/v1/scores", {"prompt": "p", "answers": ["dear me", "now", "dear now", ""]})
    rows = [row[0] for row in reply.json["data"]]
    assert [(row["value"], row["is_valid"]) for row in rows] == [(1.0, True), (0.0, True), (0.5, True), (0.5, False)]
    assert {(row["dimension"], row["low"], row["high"]) for row in rows} == {("heat", "cold", "warm")}
    for odd in ({"prompt": "p", "answers": []}, {"prompt": "p"}, {"prompt": "p", "answers": ["x"] * 65}):
        assert own.ask("POST", "/v1/scores", odd).status == 400


def test_without_scorers_that_is_said(served: Running) -> None:
    assert Scales(None).dimensions == frozenset()
    reply = served.ask("POST", "/v1/scores", {"prompt": "p", "answers": ["x"]})
    assert (reply.status, reply.error["code"]) == (404, "no_scorers")


def test_an_experts_own_record_says_its_dimension(small_base: Path, tmp_path: Path) -> None:
    folder = write_expert(tmp_path / "experts" / "mine", seed=1)
    write_record(folder, side="brave", dimension="courage")
    settings = Settings("small", limits=Limits(max_context=256))
    with running(small_base, tmp_path / "experts", settings) as served:
        told = served.ask("GET", "/v1/experts").json
        assert (told["data"][0]["dimension"], told["data"][0]["side"]) == ("courage", "brave")
        assert told["dimensions"][0]["experts"] == ["mine"]
