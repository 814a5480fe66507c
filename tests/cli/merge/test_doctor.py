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


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("--pairs", "one"), "must be SIDE=FILE"),
        (("--pairs", "one=a.jsonl", "--pairs", "one=b.jsonl"), "each side once"),
        (("--pairs", "one=a.jsonl"), "--base is not given"),
        (("--on", "sft"), "--pairs is not given"),
    ],
)
def test_pairs_that_cannot_be_measured_are_usage_errors(
    experts: Path, psoups: Run, arguments: tuple[str, ...], problem: str
) -> None:
    code, _, err = psoups("doctor", experts, *arguments)
    assert code == 2
    assert problem in " ".join(err.split())


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_pairs_show_what_each_expert_does_and_what_the_soup_is_expected_to_do(
    tmp_path: Path, experts: Path, small_base: Path, psoups: Run
) -> None:
    lines = [{"prompt": f"wash kettle {at}", "chosen": "rub it dry", "rejected": "no"} for at in range(3)]
    (tmp_path / "one.jsonl").write_text("\n".join(map(json.dumps, lines)))
    arguments = ("doctor", experts, "--base", small_base, "--same-base", "--pairs", f"one={tmp_path / 'one.jsonl'}")
    _, out, _ = psoups(*arguments, "--weights", "one=1,two=0.5", "--json")
    (forecast,) = json.loads(out)["interference"]
    assert (forecast["side"], forecast["num_pairs"]) == ("one", 3)
    assert forecast["changes"].keys() == {"one", "two"}
    assert {forecast["alone"], forecast["soup"]} <= {0, 1 / 3, 2 / 3, 1}
    _, out, _ = psoups(*arguments)
    assert "by one" in " ".join(out.split())
