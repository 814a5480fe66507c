from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertLibrary, Profile, merge
from personalized_soups.errors import IncompatibleExpertsError
from tests import oracles
from tests.experts import SHAPES, write_config, write_expert, write_record
from tests.merging.doctor.diagnosing import (
    WEIGHTS_FILE,
    diagnosed,
    only,
    opposed_share,
    rewrite,
    vector,
)
from tests.merging.writing.test_into_base import write_base
from tests.oracles import Matrix

Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Three experts of the same rank, scaling and dtype, without findings."""
    for index, name in enumerate(("one", "two", "three")):
        write_expert(tmp_path / "experts" / name, seed=index)
    return tmp_path / "experts"


def test_an_untrained_expert_is_a_warning(experts: Path) -> None:
    rewrite(experts / "two", lambda name, values: values * 0 if "lora_B" in name else values)
    diagnosis = diagnosed(experts)
    assert only(diagnosis, "untrained", "warning").what.startswith("two changes nothing")
    assert {pair.cosine for pair in diagnosis.pairs if "two" in (pair.one, pair.other)} == {None}
    assert not diagnosis.has_errors
    # a single module of zeros is no finding
    write_expert(experts / "two", seed=1)
    rewrite(experts / "two", lambda name, values: values * 0 if "q_proj.lora_B" in name else values)
    assert not diagnosed(experts).of_kind("untrained")


@pytest.mark.parametrize(("factor", "dominates"), [(6.0, True), (2.0, False)])
def test_an_expert_that_dominates_the_soup_is_a_warning(experts: Path, factor: float, dominates: bool) -> None:
    rewrite(experts / "two", lambda name, values: values * factor if "lora_B" in name else values)
    diagnosis = diagnosed(experts)
    assert bool(diagnosis.of_kind("norm")) == dominates
    if dominates:
        norms = {name: np.linalg.norm(vector(experts / name)) for name in ("one", "two", "three")}
        times = norms["two"] / np.mean([norms["one"], norms["three"]])
        assert f"two is {times:.3g} times as large" in only(diagnosis, "norm", "warning").what
    # a small weight removes the warning
    assert not diagnosed(experts, profile=Profile(weights={"one": 1, "two": 1 / factor, "three": 1})).of_kind("norm")


def test_a_change_as_large_as_the_base_is_a_warning(tmp_path: Path, experts: Path) -> None:
    base = write_base(tmp_path / "base")
    norm = {facts.name: facts.relative for facts in diagnosed(experts, base=base).experts}["two"]
    assert norm is not None
    for share, is_large in ((0.45, False), (0.55, True)):
        write_expert(experts / "two", seed=1)
        scale = share / norm
        rewrite(experts / "two", lambda name, values, scale=scale: values * scale if "lora_B" in name else values)
        assert ("two" in {finding.where for finding in diagnosed(experts, base=base).of_kind("large")}) == is_large
    assert not diagnosed(experts).of_kind("large")


def test_duplicates_are_one_warning(experts: Path) -> None:
    shutil.copytree(experts / "one", experts / "copy")
    diagnosis = diagnosed(experts)
    assert only(diagnosis, "duplicate", "warning").where == "copy, one"
    assert not diagnosis.of_kind("one direction")
    # a copy times 1 + 2^-20 is not a duplicate, but it has the same direction
    rewrite(experts / "copy", lambda name, values: values * (1 + 2.0**-20))
    diagnosis = diagnosed(experts)
    assert not diagnosis.of_kind("duplicate")
    assert only(diagnosis, "one direction", "warning").where == "copy, one"


def mixed(experts: Path, share: float, sign: float = 1.0) -> None:
    """Make `two` the sum of `one` and an independent part on the same A."""
    write_expert(experts / "two", seed=1, a_seed=1000)
    other = oracles.read_tensors(experts / "one" / WEIGHTS_FILE)

    def change(name: str, values: Matrix) -> Matrix:
        return sign * share * other[name] + (1 - share) * values if "lora_B" in name else values

    rewrite(experts / "two", change)


@pytest.mark.parametrize(("share", "sign"), [(0.9, 1.0), (0.9, -1.0), (0.5, 1.0)])
def test_experts_of_one_direction_are_a_warning_unless_they_are_of_one_dimension(
    experts: Path, share: float, sign: float
) -> None:
    mixed(experts, share, sign)
    one, two = vector(experts / "one"), vector(experts / "two")
    cosine = float(one @ two / (np.linalg.norm(one) * np.linalg.norm(two)))
    diagnosis = diagnosed(experts)
    assert bool(diagnosis.of_kind("one direction")) == (abs(cosine) > 0.9) == (share > 0.8)
    if share > 0.8:
        what = only(diagnosis, "one direction", "warning").what
        assert f"(cosine {cosine:.3f})" in what
        assert ("their weights add up" in what) == (sign > 0)
        assert ("equal weights cancel" in what) == (sign < 0)
        assert not diagnosis.of_kind("overlap")
    for name, dimension in (("one", "style"), ("two", "style"), ("three", "length")):
        write_record(experts / name, dimension=dimension)
    assert not diagnosed(experts).of_kind("one direction")
    write_record(experts / "two", dimension="length")
    assert bool(diagnosed(experts).of_kind("one direction")) == (share > 0.8)


def turned(experts: Path) -> None:
    """Give `two` the row space of `one`'s A and the column space of its B, with other numbers."""
    write_expert(experts / "two", seed=1)
    other = oracles.read_tensors(experts / "one" / WEIGHTS_FILE)
    random = np.random.default_rng(3)

    def change(name: str, values: Matrix) -> Matrix:
        turn = random.normal(size=(4, 4))
        changed: Matrix = turn @ other[name] if "lora_A" in name else other[name] @ turn
        return changed

    rewrite(experts / "two", change)


def test_experts_that_act_on_the_same_features_are_a_warning(experts: Path) -> None:
    assert not diagnosed(experts).of_kind("overlap")
    mixed(experts, 0.0)
    diagnosis = diagnosed(experts)
    assert [pair.inputs for pair in diagnosis.pairs if (pair.one, pair.other) == ("one", "two")] == [pytest.approx(1)]
    assert not diagnosis.of_kind("overlap")  # only the inputs overlap: the A's are equal
    turned(experts)
    what = only(diagnosed(experts), "overlap", "warning").what
    assert "by 1.00 (inputs) and 1.00 (outputs)" in what


def test_opposite_signs_are_a_warning(experts: Path) -> None:
    assert not diagnosed(experts).of_kind("signs")
    mixed(experts, 0.5, -1.0)
    diagnosis = diagnosed(experts, num_rows=96)
    share = opposed_share(vector(experts / "one"), vector(experts / "two"))
    assert f"opposite signs in {share:.0%}" in only(diagnosis, "signs", "warning").what


@pytest.mark.parametrize(("weights", "kind"), [((1, -1), "cancel"), ((1, 1), "pile up"), ((1, 0.1), None)])
def test_weights_that_cancel_or_pile_up_are_a_warning(
    experts: Path, weights: tuple[float, float], kind: str | None
) -> None:
    mixed(experts, 0.9)
    diagnosis = diagnosed(experts, profile=Profile(weights=dict(zip(("one", "two"), weights, strict=True))))
    assert {finding.kind for finding in diagnosis.findings} & {"cancel", "pile up"} == ({kind} if kind else set())
    if kind:
        norm = np.linalg.norm(sum(w * vector(experts / n) for w, n in zip(weights, ("one", "two"), strict=True)))
        assert f"|sum w d| is {norm:.3g}" in only(diagnosis, kind, "warning").what


@pytest.mark.parametrize(
    ("options", "kinds"),
    [
        ({"rank": 2, "alpha": 4}, {"rank"}),
        ({"alpha": 4}, {"scaling"}),
        ({"dtype": "BF16"}, {"dtype"}),
        ({"shapes": {name: shape for name, shape in SHAPES.items() if "q_proj" not in name}}, {"modules"}),
        ({"a_seed": 1000}, {"partly shared basis"}),
        ({}, set()),
    ],
)
def test_differences_that_can_be_merged_are_notes(experts: Path, options: Mapping[str, Any], kinds: set[str]) -> None:
    write_expert(experts / "two", seed=1, **options)
    diagnosis = diagnosed(experts)
    notes = {finding.kind for finding in diagnosis.findings}
    assert notes - {"rank of the merge"} == kinds
    for kind in kinds:
        assert "two" in only(diagnosis, kind, "note").what + only(diagnosis, kind, "note").where


def test_a_shared_basis_and_the_rank_of_the_merge_are_those_of_the_merge(experts: Path) -> None:
    for index, name in enumerate(("one", "two", "three")):
        write_expert(experts / name, seed=index, a_seed=7)
    diagnosis = diagnosed(experts)
    assert only(diagnosis, "shared basis", "note").where == "one, three, two"
    weights = {"one": 1.0, "two": 1.0, "three": 1.0}
    assert diagnosis.shares_basis is True
    assert diagnosis.rank == merge(ExpertLibrary.open(experts), Profile(weights=weights)).plan.rank == 4
    write_expert(experts / "two", seed=1, rank=3, a_seed=8)
    diagnosis = diagnosed(experts)
    assert diagnosis.rank == merge(ExpertLibrary.open(experts), Profile(weights=weights)).plan.rank == 7
    assert "has rank 7" in only(diagnosis, "rank of the merge", "note").what
    assert "--max-lora-rank 8" in only(diagnosis, "rank of the merge", "note").mend


def test_a_rank_that_vllm_does_not_load_is_a_warning(tmp_path: Path) -> None:
    for index in range(2):
        write_expert(tmp_path / str(index), seed=index, rank=300, shapes={"model.layers.0.mlp.up_proj": (8, 6)})
    diagnosis = diagnosed(tmp_path)
    assert (diagnosis.rank, diagnosis.vllm_max_lora_rank) == (600, None)
    assert only(diagnosis, "rank of the merge", "warning").mend == "merge with rank 64"


def test_tensors_trained_whole_are_a_note_and_are_checked(experts: Path) -> None:
    folder = experts / "two"
    tensors = {name: ("F32", values) for name, values in oracles.read_tensors(folder / WEIGHTS_FILE).items()}
    tensors[f"{Q_PROJ}.lora_magnitude_vector"] = ("F32", np.ones(64))
    for module, (out_features, _) in SHAPES.items():
        tensors[f"base_model.model.{module}.lora_magnitude_vector"] = ("F32", np.ones(out_features))
    oracles.write_tensors(folder / WEIGHTS_FILE, tensors)
    write_config(folder, use_dora=True)
    assert "two holds 8 tensors" in only(diagnosed(experts), "trained whole", "note").what
    tensors[f"{Q_PROJ}.lora_magnitude_vector"][1][3] = math.nan
    oracles.write_tensors(folder / WEIGHTS_FILE, tensors)
    assert "lora_magnitude_vector" in only(diagnosed(experts), "not finite", "error").what


@pytest.mark.parametrize("start", ["model.language_model.", "module.model.", "wrapped.model."])
def test_experts_with_different_names_for_one_base_are_an_error_or_a_warning(tmp_path: Path, start: str) -> None:
    apart = {f"{start}{name.removeprefix('model.')}": shape for name, shape in SHAPES.items()}
    write_expert(tmp_path / "one", seed=1)
    write_expert(tmp_path / "two", seed=2, shapes=apart)
    diagnosis = diagnosed(tmp_path)
    names = diagnosis.of_kind("names")
    if start == "wrapped.model.":  # not a known wrapper: it may be another part of the base
        assert not names
    else:
        message = only(diagnosis, "names", "error").what
        assert f"one has {min(SHAPES)}.weight, but two has {min(apart)}.weight (and 7 more modules)" in message
        assert diagnosis.rank is None
        with pytest.raises(IncompatibleExpertsError, match="different names for the same modules"):
            merge(ExpertLibrary.open(tmp_path), Profile(weights={"one": 1.0, "two": 1.0}))
    modules = diagnosis.of_kind("modules")
    assert [finding.severity for finding in modules] == ["warning"] * 2
    for finding, own, other in zip(modules, (SHAPES, apart), (apart, SHAPES), strict=True):
        assert f"8 of its module names end like theirs ({min(own)}, {min(other)})" in finding.what


def test_experts_of_different_layers_are_notes(tmp_path: Path) -> None:
    for name, number in (("one", "0"), ("two", "1")):
        own = {module: shape for module, shape in SHAPES.items() if f".{number}." in module}
        write_expert(tmp_path / name, seed=int(number), shapes=own)
    assert [finding.severity for finding in diagnosed(tmp_path).of_kind("modules")] == ["note"] * 2
