from __future__ import annotations

import json
import math
from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertLibrary, Profile
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.merging.doctor.diagnose import diagnose
from personalized_soups.merging.doctor.measures import sampled_rows
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

# Sums of some thousand products in float64.
CLOSE = 1e-9


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """Three experts of the same rank, scaling and dtype, without findings."""
    for index, name in enumerate(("one", "two", "three")):
        write_expert(tmp_path / "experts" / name, seed=index)
    return tmp_path / "experts"


def mean_square_cosine(first: Matrix, second: Matrix) -> float:
    bases = [np.linalg.qr(rows.T)[0] for rows in (first, second)]
    return float(np.mean(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False) ** 2))


def test_experts_that_fit_have_no_findings(tmp_path: Path, experts: Path) -> None:
    base = write_base(tmp_path / "base")
    for path in base.glob("*.safetensors"):  # a base whose norm is large compared with the experts'
        tensors = {name: (kind, 100 * np.frombuffer(raw, "<f4").reshape(shape).astype(float))
                   for name, (kind, shape, raw) in oracles.raw_tensors(path).items()}  # fmt: skip
        oracles.write_tensors(path, tensors)
    steps: list[tuple[int, int]] = []
    diagnosis = diagnosed(experts, base=base, progress=lambda done, total: steps.append((done, total)))
    assert [finding.kind for finding in diagnosis.findings] == ["rank of the merge"]
    assert not diagnosis.has_errors
    assert (diagnosis.rank, diagnosis.vllm_max_lora_rank, diagnosis.shares_basis, diagnosis.pile) == (
        12,
        16,
        False,
        None,
    )
    assert steps == [(number, len(SHAPES)) for number in range(1, len(SHAPES) + 1)]
    json.dumps(diagnosis.as_json(), allow_nan=False)


def test_norms_cosines_overlaps_and_signs_are_those_of_dense_float64(tmp_path: Path) -> None:
    kinds: Mapping[str, Mapping[str, Any]] = {
        "one": {"rank": 2, "alpha": 8, "use_rslora": True},
        "three": {"rank": 5, "alpha": 1, "dtype": "F16"},
        "two": {"rank": 4, "alpha": 6},
    }
    folders = {
        name: write_expert(tmp_path / "experts" / name, seed=index, **kind)
        for index, (name, kind) in enumerate(kinds.items())
    }
    base = write_base(tmp_path / "base")
    diagnosis = diagnosed(tmp_path / "experts", base=base, num_rows=96)
    assert diagnosis.rows_looked_at == "all rows"
    stored = {name: w for path in base.glob("*.safetensors") for name, w in oracles.read_tensors(path).items()}
    whole = math.sqrt(sum((stored[f"{module}.weight"] ** 2).sum() for module in SHAPES))
    for facts in diagnosis.experts:
        norm = np.linalg.norm(vector(folders[facts.name]))
        assert facts.norm == pytest.approx(norm, rel=CLOSE)
        assert facts.relative == pytest.approx(norm / whole, rel=1e-6)  # the base's norms are summed in blocks
    assert [(pair.one, pair.other) for pair in diagnosis.pairs] == list(combinations(sorted(folders), 2))
    for pair in diagnosis.pairs:
        left, right = vector(folders[pair.one]), vector(folders[pair.other])
        cosine = left @ right / (np.linalg.norm(left) * np.linalg.norm(right))
        assert pair.cosine == pytest.approx(cosine, abs=CLOSE)
        assert pair.opposed == pytest.approx(opposed_share(left, right), rel=CLOSE)
        first, second = (
            oracles.factors(oracles.read_tensors(folders[name] / WEIGHTS_FILE)) for name in (pair.one, pair.other)
        )
        inputs = [mean_square_cosine(first[module][0], second[module][0]) for module in SHAPES]
        outputs = [mean_square_cosine(first[module][1].T, second[module][1].T) for module in SHAPES]
        assert pair.inputs == pytest.approx(np.mean(inputs), rel=CLOSE)
        assert pair.outputs == pytest.approx(np.mean(outputs), rel=CLOSE)


def test_signs_are_estimated_from_a_sample_of_rows(experts: Path) -> None:
    diagnosis = diagnosed(experts, num_rows=40)
    assert diagnosis.rows_looked_at == "40 rows of each module, drawn with seed 0"
    for pair in diagnosis.pairs:
        differ, energy = np.zeros(2), np.zeros(2)
        deltas = [oracles.deltas(experts / name) for name in (pair.one, pair.other)]
        for module, (out_features, _) in SHAPES.items():
            rows = sampled_rows(module, out_features, 40).numpy()
            assert len(set(rows)) == min(40, out_features)
            parts = [delta[module][rows] for delta in deltas]
            apart = np.sign(parts[0]) * np.sign(parts[1]) < 0
            for index, part in enumerate(parts):
                differ[index] += (part**2)[apart].sum() * out_features / len(rows)
                energy[index] += (part**2).sum() * out_features / len(rows)
        assert pair.opposed == pytest.approx(np.mean(differ / energy), rel=CLOSE)
        # the standard error of a share of about 5000 nearly independent entries is about 0.01
        assert pair.opposed == pytest.approx(
            opposed_share(vector(experts / pair.one), vector(experts / pair.other)), abs=0.05
        )


def test_the_norms_of_a_profiles_sum_are_those_of_dense_float64(experts: Path) -> None:
    weights = {"one": 0.7, "two": -0.4, "three": 1.3}
    diagnosis = diagnosed(experts, profile=Profile(weights=weights))
    parts = [weight * vector(experts / name) for name, weight in weights.items()]
    norms = [float(np.linalg.norm(part)) for part in parts]
    assert diagnosis.pile is not None
    assert diagnosis.pile.norm == pytest.approx(np.linalg.norm(sum(parts)), rel=CLOSE)
    assert diagnosis.pile.orthogonal == pytest.approx(math.hypot(*norms), rel=CLOSE)
    assert diagnosis.pile.most == pytest.approx(sum(norms), rel=CLOSE)
    assert {facts.name: facts.weight for facts in diagnosis.experts} == weights
    assert not diagnosis.of_kind("cancel")
    assert not diagnosis.of_kind("pile up")


def test_every_expert_that_cannot_be_read_is_an_error_and_the_others_are_measured(experts: Path) -> None:
    (experts / "one" / WEIGHTS_FILE).write_bytes(b"short")
    write_config(experts / "two", init_lora_weights="pissa")
    write_expert(experts / "four", seed=4)
    (experts / "four" / "expert.json").write_text("{")
    diagnosis = diagnosed(experts)
    errors = diagnosis.of_kind("expert")
    assert [error.severity for error in errors] == ["error"] * 3
    assert {name for name in ("one", "two", "three", "four") if any(e.what.startswith(name) for e in errors)} == {
        "one",
        "two",
        "four",
    }
    assert "pissa" in " ".join(error.what for error in errors)
    assert [facts.name for facts in diagnosis.experts] == ["three"]
    assert diagnosis.has_errors


def test_several_disagreements_are_reported_at_once(tmp_path: Path, experts: Path) -> None:
    write_config(experts / "one", base="another")
    write_expert(experts / "two", seed=1, shapes={**SHAPES, "model.layers.0.self_attn.q_proj": (64, 32)})
    rewrite(experts / "three", lambda name, values: values * (math.nan if "k_proj" in name else 1))
    diagnosis = diagnosed(experts)
    assert {finding.kind for finding in diagnosis.findings if finding.severity == "error"} == {
        "base",
        "shape",
        "not finite",
    }
    assert diagnosis.rank is None
    assert "[64, 32]" in only(diagnosis, "shape", "error").what
    # the modules that fit are compared
    (pair,) = [pair for pair in diagnosis.pairs if {pair.one, pair.other} == {"one", "two"}]
    assert pair.cosine is not None
    json.dumps(diagnosis.as_json(), allow_nan=False)


def test_same_base_accepts_bases_of_different_names(experts: Path) -> None:
    write_config(experts / "one", base="another")
    assert "another" in only(diagnosed(experts), "base", "error").what
    assert not diagnosed(experts, same_base=True).has_errors


def test_another_base_or_a_missing_module_is_an_error_for_each_expert(tmp_path: Path, experts: Path) -> None:
    base = write_base(tmp_path / "base")
    assert not diagnosed(experts, base=base).has_errors
    write_record(experts / "one", base={"name": "base", "fingerprint": "0" * 64})
    for name in ("two", "three"):
        write_expert(experts / name, seed=1, shapes={**SHAPES, f"model.layers.0.mlp.{name}": (4, 4)})
    diagnosis = diagnosed(experts, base=base)
    assert "one" in only(diagnosis, "other base", "error").what
    assert [error.severity for error in diagnosis.of_kind("base module")] == ["error"] * 2
    assert all(
        f"model.layers.0.mlp.{name}.weight is not in the base"
        in " ".join(e.what for e in diagnosis.of_kind("base module"))
        for name in ("two", "three")
    )
    assert not diagnosed(experts, base=base, same_base=True).of_kind("other base")
    # no relative norm if the base lacks a tensor that the expert changes
    assert {facts.name for facts in diagnosis.experts if facts.relative is not None} == {"one"}
    with pytest.raises(InputError):
        diagnosed(experts, base=tmp_path / "nowhere")


def test_a_damaged_base_is_an_error(tmp_path: Path, experts: Path) -> None:
    base = write_base(tmp_path / "base", shards=1)
    tensors = {name: ("F32", values) for name, values in oracles.read_tensors(base / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][1][3, 4] = math.inf
    oracles.write_tensors(base / "model.safetensors", tensors)
    assert "layers.1.mlp.up_proj" in only(diagnosed(experts, base=base), "base tensor", "error").what


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_infinity_are_errors_that_name_the_tensors(experts: Path, value: float) -> None:
    def damage(name: str, values: Matrix) -> Matrix:
        if "layers.1" in name and "lora_A" in name:
            values[1, 2] = value
        return values

    rewrite(experts / "two", damage)
    finding = only(diagnosed(experts), "not finite", "error")
    assert finding.what.startswith("two: ")
    assert f"the value at [1, 2] is {value}" in finding.what
    assert finding.where == str(experts / "two" / WEIGHTS_FILE)
    for module in SHAPES:
        assert (f"{module}.lora_A" in finding.what) == ("layers.1" in module)


def test_experts_of_weight_0_are_left_out(experts: Path) -> None:
    rewrite(experts / "three", lambda name, values: values * 0 if "lora_B" in name else values)
    diagnosis = diagnosed(experts, profile=Profile(weights={"one": 1, "two": 1, "three": 0}))
    assert not diagnosis.of_kind("untrained")
    assert diagnosis.rank == 8
    with pytest.raises(DeclarationError, match="'four'"):
        diagnosed(experts, profile=Profile(weights={"four": 1}))


def test_opposed_sides_and_needs_of_the_method_are_errors(experts: Path) -> None:
    write_record(experts / "one", dimension="style")
    write_record(experts / "two", dimension="style")
    write_expert(experts / "three", seed=2, rank=2)
    weights = {"one": 1.0, "two": -1.0, "three": 0.0}
    diagnosis = diagnosed(experts, profile=Profile(weights=weights, method="factor_average"))
    assert "two sides of one dimension" in only(diagnosis, "opposed sides", "error").what
    assert "divides by the sum" in only(diagnosis, "method", "error").what
    diagnosis = diagnosed(experts, profile=Profile(weights={"one": 1.0, "three": 1.0}, method="factor_average"))
    assert not diagnosis.of_kind("opposed sides")
    assert {finding.what.partition(":")[0] for finding in diagnosis.of_kind("method")} == {
        "the method factor_average needs one rank for all experts, but their ranks differ",
        "the method factor_average needs one scaling for all experts, but their scalings differ",
    }


def test_errors_come_first_and_experts_may_be_a_list(experts: Path) -> None:
    write_expert(experts / "two", seed=1, rank=2, alpha=4)
    rewrite(experts / "one", lambda name, values: values * 0 if "lora_B" in name else values)
    rewrite(experts / "three", lambda name, values: values * math.nan)
    library = ExpertLibrary.open(experts)
    diagnosis = diagnose(list(library.values()))
    assert [finding.severity for finding in diagnosis.findings] == ["error", "warning", "note", "note"]
    assert diagnosis == diagnose(library)


def test_a_library_without_a_readable_expert(experts: Path) -> None:
    for folder in experts.iterdir():
        (folder / WEIGHTS_FILE).unlink()
    diagnosis = diagnosed(experts)
    assert len(diagnosis.of_kind("expert")) == len(diagnosis.findings) == 3
    assert (diagnosis.experts, diagnosis.pairs, diagnosis.rank) == ((), (), None)
