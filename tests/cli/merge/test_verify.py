from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups import ExpertLibrary, Profile, merge, merge_into_base
from tests.cli.conftest import Run
from tests.experts import write_expert
from tests.merging.writing.test_into_base import write_base

PROFILE = Profile(weights={"one": 0.7, "two": -0.4})


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    for index, name in enumerate(PROFILE.weights):
        write_expert(tmp_path / "experts" / name, seed=index)
    return ExpertLibrary.open(tmp_path / "experts")


def test_a_sound_adapter_and_a_sound_model_exit_with_0(tmp_path: Path, library: ExpertLibrary, psoups: Run) -> None:
    adapter = merge(library, PROFILE).write(tmp_path / "adapter")
    code, out, err = psoups("verify", adapter)
    assert code == 0
    assert "merged adapter" in out
    assert "16, identical" in out
    assert "verifying" in err
    model = merge_into_base(library, PROFILE, write_base(tmp_path / "base"), tmp_path / "model")
    code, out, err = psoups("verify", model, "--json")
    assert (code, err) == (0, "")
    printed = json.loads(out)
    assert (printed["sound"], printed["verdict"], printed["kind"], printed["num_tensors"]) == (
        True,
        "identical",
        "model",
        17,
    )


def test_a_folder_that_differs_from_its_record_exits_with_1_and_reports_why(
    tmp_path: Path, library: ExpertLibrary, psoups: Run
) -> None:
    adapter = merge(library, PROFILE).write(tmp_path / "adapter")
    write_expert(tmp_path / "experts" / "two", seed=9)
    code, out, _ = psoups("verify", adapter)
    assert code == 1
    assert "16, different" in out
    assert "has changed since" in out
    code, out, _ = psoups("verify", adapter, "--json")
    assert code == 1
    printed = json.loads(out)
    assert (printed["sound"], printed["num_different"], len(printed["differences"])) == (False, 16, 8)
    assert [fault["subject"] for fault in printed["faults"]] == ["expert"]


def test_moved_experts_and_a_moved_base_are_given_as_options(
    tmp_path: Path, library: ExpertLibrary, psoups: Run
) -> None:
    model = merge_into_base(library, PROFILE, write_base(tmp_path / "base"), tmp_path / "model")
    (tmp_path / "experts").rename(tmp_path / "here")
    (tmp_path / "base").rename(tmp_path / "there")
    code, _, err = psoups("verify", model)
    assert code == 2
    assert "--experts" in err
    code, _, err = psoups("verify", model, "--experts", tmp_path / "here")
    assert code == 2
    assert "--base" in err
    assert psoups("verify", model, "--experts", tmp_path / "here", "--base", tmp_path / "there")[0] == 0


def test_a_folder_without_a_record_is_a_usage_error(tmp_path: Path, psoups: Run) -> None:
    code, out, err = psoups("verify", tmp_path)
    assert (code, out) == (2, "")
    assert "no soup.json" in err
    assert psoups("verify", tmp_path, "--device", "tpu")[0] == 2
