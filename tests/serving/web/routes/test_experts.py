"""/v1/experts, reloading what has changed on the disk, and /v1/scores."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from personalized_soups.adapters.library import ExpertLibrary
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load_data
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.scales import Scales
from personalized_soups.serving.engine.limits import Limits
from personalized_soups.serving.protocol.expert_files import ExpertFiles, ExpertsChangedError
from personalized_soups.serving.web.settings import Settings
from tests.experts import write_expert, write_record
from tests.mixing.worlds import write_experts
from tests.serving.servers import RunningServer, running, send_raw

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
def own(small_base: Path, folder: Path) -> Iterator[RunningServer]:
    settings = Settings("small", limits=Limits(max_rows=2, max_context=256))
    with running(small_base, folder, settings, catalogue=CATALOGUE) as served:
        yield served


def _body(weights: dict[str, float] | None, **options: Any) -> dict[str, Any]:
    profile = {} if weights is None else {"profile": {"weights": weights}}
    messages = [{"role": "user", "content": "wash it"}]
    return {"model": "small", "messages": messages, "max_tokens": 8, "temperature": 0, **profile, **options}


def _said(served: RunningServer, weights: dict[str, float] | None) -> str:
    reply = served.ask("POST", "/v1/chat/completions", _body(weights))
    assert reply.status == 200, reply.body
    return str(reply.json["choices"][0]["message"]["content"])


def test_experts_and_dimensions_are_listed_from_low_to_high(own: RunningServer) -> None:
    output = own.ask("GET", "/v1/experts").json
    assert output["base"] == "small"
    assert [each["name"] for each in output["data"]] == ["cold", "plain", "warm"]
    warm = output["data"][2]
    assert (warm["dimension"], warm["side"], warm["about"], warm["rank"], warm["is_changed"]) == (
        "heat", "warm", "Be warm.", 3, False,
    )  # fmt: skip
    assert output["data"][1]["dimension"] is None
    assert output["dimensions"] == [
        {"name": "heat", "about": "How warm an answer is.", "sides": ["cold", "warm"], "experts": ["cold", "warm"],
         "first": "warm", "is_scored": True}
    ]  # fmt: skip


def test_a_changed_expert_is_refused_until_it_is_reloaded(own: RunningServer, folder: Path) -> None:
    before, other = _said(own, {"warm": 2.0}), _said(own, {"cold": 2.0})
    write_expert(folder / "new", seed=9)
    shutil.rmtree(folder / "warm")
    write_expert(folder / "warm", seed=77, rank=5, alpha=20)
    output = {each["name"]: each["is_changed"] for each in own.ask("GET", "/v1/experts").json["data"]}
    assert output == {"cold": False, "plain": False, "warm": True}
    refused = own.ask("POST", "/v1/chat/completions", _body({"warm": 2.0}))
    assert (refused.status, refused.error["code"], refused.headers["retry-after"]) == (503, "experts_changed", "5")
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


def test_an_expert_that_is_damaged_is_not_loaded_and_the_old_ones_serve_on(own: RunningServer, folder: Path) -> None:
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


def test_a_reload_waits_for_running_answers_which_stay_what_they_were(own: RunningServer, folder: Path) -> None:
    long = _body({"warm": 2.0}, max_tokens=200, logit_bias={"1": -100})
    want = own.ask("POST", "/v1/chat/completions", long).json["choices"][0]["message"]["content"]
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.append(own.ask("POST", "/v1/chat/completions", long)))
    asking.start()
    own.wait_until(lambda: own.server.batcher.load.running == 1)
    shutil.rmtree(folder / "warm")
    write_expert(folder / "warm", seed=77, rank=5, alpha=20)
    assert own.ask("POST", "/v1/experts/reload").status == 200
    asking.join()
    assert found[0].json["choices"][0]["message"]["content"] == want
    assert own.ask("POST", "/v1/chat/completions", long).json["choices"][0]["message"]["content"] != want


def test_those_who_wait_for_an_expert_that_goes_are_told(own: RunningServer, folder: Path) -> None:
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
    asking.join()
    assert found[0].status == 422
    assert "'warm'" in found[0].error["message"]
    first.close()


def test_answers_are_scored_in_each_dimension_that_has_a_scorer(own: RunningServer) -> None:
    reply = own.ask("POST", "/v1/scores", {"prompt": "p", "answers": ["dear me", "now", "dear now", ""]})
    rows = [row[0] for row in reply.json["data"]]
    assert [(row["value"], row["is_valid"]) for row in rows] == [(1.0, True), (0.0, True), (0.5, True), (0.5, False)]
    assert {(row["dimension"], row["low"], row["high"]) for row in rows} == {("heat", "cold", "warm")}
    for odd in ({"prompt": "p", "answers": []}, {"prompt": "p"}, {"prompt": "p", "answers": ["x"] * 65}):
        assert own.ask("POST", "/v1/scores", odd).status == 400


def test_without_scorers_that_is_said(served: RunningServer) -> None:
    assert Scales(None).dimensions == frozenset()
    reply = served.ask("POST", "/v1/scores", {"prompt": "p", "answers": ["x"]})
    assert (reply.status, reply.error["code"]) == (404, "no_scorers")


def test_an_experts_own_record_says_its_dimension(small_base: Path, tmp_path: Path) -> None:
    folder = write_expert(tmp_path / "experts" / "mine", seed=1)
    write_record(folder, side="brave", dimension="courage")
    settings = Settings("small", limits=Limits(max_context=256))
    with running(small_base, tmp_path / "experts", settings) as served:
        output = served.ask("GET", "/v1/experts").json
        assert (output["data"][0]["dimension"], output["data"][0]["side"]) == ("courage", "brave")
        assert output["dimensions"][0]["experts"] == ["mine"]


def test_dimensions_stand_in_the_catalogues_order(small_base: Path, folder: Path) -> None:
    write_record(folder / "warm", side="brave", dimension="courage")  # of no catalogue
    sides = {"plain": {"label": "P1A", "instruction": "Be plain."}}
    heat = {"cold": {"label": "P2A", "instruction": "Be cold."}}
    declared = {"dimensions": {"zeal": {"about": "z", "sides": sides}, "heat": {"about": "h", "sides": heat}}}
    settings = Settings("small", limits=Limits(max_context=256))
    with running(small_base, folder, settings, catalogue=load_data(declared, Catalogue, "catalogue")) as served:
        output = served.ask("GET", "/v1/experts").json["dimensions"]
    assert [each["name"] for each in output] == ["zeal", "heat", "courage"]
    assert [each["experts"] for each in output] == [["plain"], ["cold"], ["warm"]]


@pytest.fixture
def files(folder: Path) -> ExpertFiles:
    found = ExpertFiles(lambda: ExpertLibrary.open(folder))
    found.serve(found.look()[1])
    return found


def _difference(files: ExpertFiles) -> tuple[list[str], list[str]]:
    fresh, gone = files.difference(*files.look())
    return [expert.name for expert in fresh], gone


def test_what_has_not_changed_is_not_loaded_again(files: ExpertFiles) -> None:
    assert _difference(files) == ([], [])
    files.check(["cold", "plain", "warm"])
    with pytest.raises(ExpertsChangedError, match="'nobody' have changed"):  # an unknown expert is not unchanged
        files.check(["cold", "nobody"])


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("way", ["as large and as old", "longer", "newer"])
def test_a_file_that_is_written_is_noticed(files: ExpertFiles, folder: Path, name: str, way: str) -> None:
    path = folder / "warm" / name
    before = path.stat()
    path.write_bytes(path.read_bytes() + (b" " if way == "longer" else b""))
    if way != "newer":
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert [each for each in ("cold", "plain", "warm") if files.is_changed(each)] == ["warm"]
    if name.endswith("json"):  # else a library that is damaged
        assert _difference(files) == (["warm"], [])


def test_a_record_that_comes_changes_or_goes_is_noticed(files: ExpertFiles, folder: Path) -> None:
    for change in (
        lambda: write_record(folder / "cold", side="cold"),
        lambda: (folder / "cold" / "expert.json").write_text(json.dumps({"side": "mild"})),
        (folder / "cold" / "expert.json").unlink,
    ):
        change()
        assert files.is_changed("cold")
        assert _difference(files) == (["cold"], [])
        files.serve(files.look()[1])
        assert not files.is_changed("cold")


def test_experts_that_come_and_go_are_told(files: ExpertFiles, folder: Path) -> None:
    shutil.rmtree(folder / "cold")
    write_expert(folder / "new", seed=9)
    assert files.is_changed("cold")
    assert _difference(files) == (["new"], ["cold"])


def _scales(**sides: dict[str, Any]) -> Scales:
    scorer = {"kind": "markers", "high": ["dear"], "low": ["now"]}
    declared = {
        name: {"label": f"P1{letter}", "instruction": "Be so.", **side}
        for letter, (name, side) in zip("AB", sides.items(), strict=False)
    }
    dimension = {"about": "How warm an answer is.", "scorer": scorer, "sides": declared}
    return Scales(load_data({"dimensions": {"heat": dimension}}, Catalogue, "catalogue"))


@pytest.mark.parametrize(("end", "ends"), [("high", ("not warm", "warm")), ("low", ("warm", "not warm"))])
def test_the_end_that_no_side_is_at_is_named_after_the_other(end: str, ends: tuple[str, str]) -> None:
    (row,) = _scales(warm={"end": end}).scores("p", "dear")
    assert ((row["low"], row["high"]), row["value"]) == (ends, 1.0)


def test_a_side_with_a_scorer_of_its_own_is_at_no_end() -> None:
    own = {"scorer": {"kind": "length", "low": 1, "high": 9}}
    (row,) = _scales(warm={"end": "high"}, cold=own).scores("p", "dear now")
    assert (row["low"], row["high"], row["value"]) == ("not warm", "warm", 0.5)
    with pytest.raises(DeclarationError, match="no side uses the scorer of the dimension 'heat'"):
        _scales(warm=own)
