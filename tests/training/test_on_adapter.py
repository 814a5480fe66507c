"""An expert on top of an SFT adapter is, byte for byte, the expert that a base with the adapter merged in would get."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from personalized_soups import ExpertLibrary, Profile, merge_into_base
from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.library import Expert
from personalized_soups.adapters.provenance import read_expert_record
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.errors import IncompatibleExpertsError, OutputExistsError
from personalized_soups.training.expert import train_expert
from personalized_soups.training.parallel import ExpertJob, train_experts
from personalized_soups.training.progress import Silent, StepReport
from tests.base_adapters import trained_on, write_sft
from tests.experts import write_expert


class Reports(Silent):
    def __init__(self) -> None:
        self.steps: list[StepReport] = []

    def advance(self, side: str, report: StepReport) -> None:
        self.steps.append(report)


@pytest.fixture(scope="module")
def recipe() -> TrainingRecipe:
    return TrainingRecipe.model_validate_json(
        """{"lora": {"rank": 4, "alpha": 8}, "dpo": {"beta": 0.3, "sft_weight": 0, "max_length": 64},
        "optimizer": {"learning_rate": 0.005, "max_steps": 4, "batch_size": 4}, "save_steps": 3}"""
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sft(tmp_path_factory.mktemp("adapters") / "sft")


@pytest.fixture(scope="module")
def trained(
    small_base: Path, sft: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[StepReport]]:
    reports, out = Reports(), tmp_path_factory.mktemp("experts") / "concise"
    train_expert(
        "concise", base=small_base, on=sft, data=pairs_file, out=out, recipe=recipe, device="cpu", progress=reports
    )
    return out, reports.steps


def test_the_expert_is_that_of_the_base_with_the_adapter_merged_in(
    *,
    small_base: Path,
    sft: Path,
    pairs_file: Path,
    recipe: TrainingRecipe,
    trained: tuple[Path, list[StepReport]],
    tmp_path: Path,
) -> None:
    merge_into_base(ExpertLibrary.open(sft), Profile(weights={"sft": 1.0}), small_base, tmp_path / "merged")
    bytes_of = {"on": (trained[0] / "adapter_model.safetensors").read_bytes()}
    for name, base in (("merged", tmp_path / "merged"), ("bare", small_base)):
        out = train_expert(
            "concise", base=base, data=pairs_file, out=tmp_path / name / "concise", recipe=recipe, device="cpu"
        )
        bytes_of[name] = (out / "adapter_model.safetensors").read_bytes()
    assert bytes_of["on"] == bytes_of["merged"]
    assert bytes_of["on"] != bytes_of["bare"]


def test_the_reference_policy_is_base_and_adapter(trained: tuple[Path, list[StepReport]]) -> None:
    """At the first step, B is 0: policy and reference agree, so the loss is -log sigmoid(0)."""
    # the log-probabilities are sums of about 60 float32 numbers below 10, computed twice: 600 * 2^-23 at most
    assert trained[1][0].loss == pytest.approx(math.log(2), abs=0.3 * 600 * 2.0**-23)
    assert trained[1][-1].loss < math.log(2)


def test_the_record_names_the_adapter_and_the_folder_holds_only_the_experts_delta(
    trained: tuple[Path, list[StepReport]], sft: Path, small_base: Path
) -> None:
    expert = Expert("concise", trained[0])
    record = read_expert_record(trained[0])
    assert record is not None
    assert record.on == BaseAdapter.open(sft).record
    assert record.on is not None
    assert record.on.name == "sft"
    assert {module.rank for module in expert.adapter.modules.values()} == {4}
    assert not {"on", "on_folder"} & record.model_copy(update={"on": None}).model_dump().keys()


def test_a_run_resumes_only_with_its_adapter(
    *,
    trained: tuple[Path, list[StepReport]],
    small_base: Path,
    sft: Path,
    pairs_file: Path,
    recipe: TrainingRecipe,
    tmp_path: Path,
) -> None:
    again = {"base": small_base, "data": pairs_file, "recipe": recipe, "device": "cpu", "resume": True}
    before = (trained[0] / "expert.json").read_bytes()
    assert train_expert("concise", on=sft, out=trained[0], **again) == trained[0]  # type: ignore[arg-type]
    assert (trained[0] / "expert.json").read_bytes() == before
    for on in (None, write_sft(tmp_path / "sft", seed=5)):
        with pytest.raises(OutputExistsError, match="adapter, data, recipe"):
            train_expert("concise", on=on, out=trained[0], **again)  # type: ignore[arg-type]


def test_several_experts_are_trained_on_one_adapter(
    *,
    small_base: Path,
    sft: Path,
    pairs_file: Path,
    recipe: TrainingRecipe,
    trained: tuple[Path, list[StepReport]],
    tmp_path: Path,
) -> None:
    job = ExpertJob("concise", pairs_file, tmp_path / "concise")
    train_experts([job], base=small_base, on=sft, recipe=recipe, device="cpu")
    name = "adapter_model.safetensors"
    assert (job.out / name).read_bytes() == (trained[0] / name).read_bytes()


def test_an_adapter_that_cannot_be_a_part_of_the_base_is_rejected_before_anything_is_written(
    small_base: Path, sft: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "concise"
    elsewhere = write_sft(tmp_path / "elsewhere")
    trained_on(elsewhere, None, base={"name": "elsewhere", "fingerprint": "ab" * 32})
    wide = write_expert(tmp_path / "wide", shapes={"model.layers.0.self_attn.q_proj": (64, 32)})
    twice = trained_on(write_expert(tmp_path / "twice"), sft)
    for folder, what in ((elsewhere, "trained on elsewhere"), (wide, r"\[64, 32\]"), (twice, "itself trained on top")):
        with pytest.raises(IncompatibleExpertsError, match=what):
            train_expert("concise", base=small_base, on=folder, data=pairs_file, out=out, recipe=recipe, device="cpu")
        # not even a folder of checkpoints
        assert not out.parent.exists() or not list(out.parent.iterdir())
