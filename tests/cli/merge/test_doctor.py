from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.conftest import Run
from tests.experts import write_config, write_expert
from tests.merging.writing.test_into_base import write_base


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    for index, name in enumerate(("one", "two")):
        write_expert(tmp_path / "experts" / name, seed=index)
    return tmp_path / "experts"


def test_compatible_experts_exit_with_0_and_are_shown(tmp_path: Path, experts: Path, psoups: Run) -> None:
    code, out, err = psoups("doctor", experts, "--base", write_base(tmp_path / "base"))
    assert code == 0
    for printed in ("|dW|/|W|", "cosine", "64 rows of each module", "has rank 8", "--max-lora-rank"):
        assert printed in " ".join(out.split()), printed
    assert "weight" not in out
    assert "modules: 8/8" in err


def test_json_holds_everything(experts: Path, psoups: Run) -> None:
    code, out, err = psoups("doctor", experts / "one", experts / "two", "--weights", "one=1,two=-1", "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert printed["errors"] is False
    assert {expert["name"]: expert["weight"] for expert in printed["experts"]} == {"one": 1, "two": -1}
    assert printed["pairs"][0].keys() == {"one", "other", "cosine", "inputs", "outputs", "opposed"}
    assert printed["pile"].keys() == {"norm", "orthogonal", "most"}
    assert printed["rank"] == 8


def test_experts_that_cannot_be_merged_exit_with_1(experts: Path, psoups: Run) -> None:
    write_config(experts / "two", base="another")
    code, out, _ = psoups("doctor", experts)
    assert code == 1
    assert "different bases" in " ".join(out.split())
    assert psoups("doctor", experts, "--same-base")[0] == 0


def test_a_profile_file_is_read(tmp_path: Path, experts: Path, psoups: Run) -> None:
    (tmp_path / "me.yaml").write_text("weights: {one: 2, two: 0.5}")
    code, out, _ = psoups("doctor", experts, "--profile", tmp_path / "me.yaml", "--rows", 96, "--json")
    assert code == 0
    printed = json.loads(out)
    assert printed["rows_looked_at"] == "all rows"
    assert [expert["weight"] for expert in printed["experts"]] == [2, 0.5]


def test_wrong_usage_exits_with_2(tmp_path: Path, experts: Path, psoups: Run) -> None:
    (tmp_path / "me.yaml").write_text("weights: {one: 2}")
    assert psoups("doctor", experts, "--profile", tmp_path / "me.yaml", "--weights", "one=1")[0] == 2
    assert psoups("doctor", experts, "--weights", "three=1")[0] == 2
    assert psoups("doctor", experts, "--base", tmp_path / "nowhere")[0] == 2
    assert psoups("doctor", tmp_path / "nowhere")[0] == 2
    assert psoups("doctor", experts, "--rows", 0)[0] == 2
    assert psoups("doctor")[0] == 2
