from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge
from personalized_soups.adapters.provenance import SoupRecord, read_soup_record
from personalized_soups.errors import InputError, OutputExistsError, RunError, UsageError
from personalized_soups.merging.computing.merged_modules import MergedModule
from personalized_soups.merging.writing.adapter import MergedAdapter
from tests import oracles
from tests.experts import SHAPES, write_expert

NAMES = ("one", "two", "three")
WEIGHTS = (0.7, -0.4, 1.3)


def profile_of(weights: Sequence[float], **fields: Any) -> Profile:
    return Profile(weights=dict(zip(NAMES, weights, strict=False)), **fields)


def library_of(root: Path, **experts: Any) -> tuple[ExpertLibrary, list[Path]]:
    """Write three experts. Each option is a list of three values, or one value for all."""
    folders = [
        write_expert(
            root / name, seed=index, **{k: v[index] if isinstance(v, tuple) else v for k, v in experts.items()}
        )
        for index, name in enumerate(NAMES)
    ]
    return ExpertLibrary.open(root), folders


def written_deltas(merged: MergedAdapter, folder: Path) -> dict[str, Any]:
    return oracles.deltas(merged.write(folder))


def record_in(folder: Path) -> SoupRecord:
    record = read_soup_record(folder)
    assert record is not None
    return record


def check_stacked(tmp_path: Path, dtype: str, folders: list[Path], merged: MergedAdapter) -> None:
    """A must equal the experts' A; B may differ by half an ulp of w s B, so the delta by half an ulp of |w s| |B| |A|.

    2^-40 covers the oracle's own float64; the smallest subnormal is owed where w s B underflows.
    """
    got = written_deltas(merged, tmp_path / "out")
    want = oracles.soup(folders, WEIGHTS)
    room = oracles.magnitudes(folders, WEIGHTS)
    assert got.keys() == want.keys()
    for module, delta in want.items():
        a = np.abs(oracles.factors(oracles.read_tensors(tmp_path / "out" / "adapter_model.safetensors"))[module][0])
        bound = (oracles.HALF_ULP[dtype] + 2.0**-40) * room[module] + oracles.SMALLEST[dtype] * a.sum(axis=0)
        assert (np.abs(got[module] - delta) <= bound).all(), module


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_a_stacked_soup_owes_half_an_ulp(tmp_path: Path, dtype: str) -> None:
    library, folders = library_of(tmp_path / "experts", rank=(2, 4, 3), alpha=(8, 4, 1), dtype=dtype)
    merged = merge(library, profile_of(WEIGHTS))
    assert merged.plan.rank == 9
    assert merged.plan.encoding == "stacked"
    check_stacked(tmp_path, dtype, folders, merged)


def test_the_bound_sees_a_fault_of_one_ulp(tmp_path: Path) -> None:
    library, folders = library_of(tmp_path / "experts")
    plan = merge(library, profile_of(WEIGHTS)).plan

    class Off(MergedAdapter):
        def each(self, finish: Callable[[MergedModule], Any]) -> Iterator[Any]:
            def nudged(module: MergedModule) -> Any:
                module.factors.b_OR.mul_(1 + 4 * 2.0**-24)
                return finish(module)

            return super().each(nudged)

    with pytest.raises(AssertionError):
        check_stacked(tmp_path, "F32", folders, Off(plan, library, torch.device("cpu")))


def test_rs_lora_and_patterns_enter_the_scaling(tmp_path: Path) -> None:
    pattern = {"layers.0.mlp.up_proj": 1, "down_proj": 32}
    library, folders = library_of(
        tmp_path / "experts", use_rslora=(True, False, False), alpha_pattern=({}, pattern, {}), rank=4
    )
    got = written_deltas(merge(library, profile_of(WEIGHTS)), tmp_path / "out")
    want = oracles.soup(folders, WEIGHTS)
    for module in SHAPES:
        assert oracles.relative_error(got[module], want[module]) < 1e-7


def test_modules_that_an_expert_lacks_contribute_zero(tmp_path: Path) -> None:
    some = {name: shape for name, shape in SHAPES.items() if "layers.0" in name}
    library, folders = library_of(tmp_path / "experts", shapes=(SHAPES, some, some), rank=(2, 3, 5))
    merged = merge(library, profile_of(WEIGHTS))
    got = written_deltas(merged, tmp_path / "out")
    want = oracles.soup(folders, WEIGHTS)
    assert got.keys() == SHAPES.keys()
    for module in SHAPES:
        assert oracles.relative_error(got[module], want[module]) < 1e-7
    shapes = {tensor.shape[0] for name, tensor in merged.tensors.items() if "lora_A" in name}
    assert shapes == {10}  # one rank for all modules: the lower ones are padded with zeros


def test_experts_of_one_basis_merge_exactly_at_their_own_rank(tmp_path: Path) -> None:
    library, folders = library_of(tmp_path / "experts", a_seed=7, alpha=(8, 4, 2))
    merged = merge(library, profile_of(WEIGHTS))
    assert merged.plan.shares_basis
    assert merged.plan.rank == 4
    got, want = written_deltas(merged, tmp_path / "out"), oracles.soup(folders, WEIGHTS)
    for module in SHAPES:
        assert oracles.relative_error(got[module], want[module]) < 1e-7


def test_a_basis_that_two_of_three_share_is_taken_once(tmp_path: Path) -> None:
    library, folders = library_of(tmp_path / "experts", a_seed=(7, 8, 7))
    merged = merge(library, profile_of(WEIGHTS))
    assert not merged.plan.shares_basis
    assert merged.plan.rank == 8
    got, want = written_deltas(merged, tmp_path / "out"), oracles.soup(folders, WEIGHTS)
    for module in SHAPES:
        assert oracles.relative_error(got[module], want[module]) < 1e-7


@pytest.mark.parametrize("rank", [1, 3, 8, 12, 40])
def test_truncation_is_the_best_at_its_rank_and_says_what_it_lost(tmp_path: Path, rank: int) -> None:
    library, folders = library_of(tmp_path / "experts")
    merged = merge(library, profile_of(WEIGHTS), MergeOptions(rank=rank))
    assert merged.plan.rank == min(rank, 12)
    got, want = written_deltas(merged, tmp_path / "out"), oracles.soup(folders, WEIGHTS)
    record = record_in(tmp_path / "out")
    lost = energy = 0.0
    for module, delta in want.items():
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        best = (left[:, :rank] * values[:rank]) @ right[:rank]
        error = oracles.relative_error(best, delta)
        # the singular values of these random soups have gaps, so that the best approximation is unique
        assert np.linalg.norm(got[module] - best) < 1e-6 * np.linalg.norm(delta)
        lost, energy = lost + float((values[rank:] ** 2).sum()), energy + float((values**2).sum())
        if rank < 12:
            assert record.truncation is not None
            assert record.truncation.modules[module] == pytest.approx(error, rel=1e-9)
    if rank < 12:
        assert record.truncation is not None
        assert record.truncation.total == pytest.approx((lost / energy) ** 0.5, rel=1e-9)
    else:
        assert record.truncation is None
        assert record.encoding == "stacked"


def test_the_total_error_counts_modules_that_were_not_truncated(tmp_path: Path) -> None:
    some = {name: shape for name, shape in SHAPES.items() if "layers.0" in name}
    library, folders = library_of(tmp_path / "experts", shapes=(SHAPES, some, some))
    merged = merge(library, profile_of(WEIGHTS), MergeOptions(rank=6))
    got, want = written_deltas(merged, tmp_path / "out"), oracles.soup(folders, WEIGHTS)
    lost = sum(float(np.linalg.norm(got[module] - delta)) ** 2 for module, delta in want.items())
    energy = sum(float(np.linalg.norm(delta)) ** 2 for delta in want.values())
    truncation = record_in(tmp_path / "out").truncation
    assert truncation is not None
    assert truncation.total == pytest.approx((lost / energy) ** 0.5, rel=1e-6)
    assert {name for name, error in truncation.modules.items() if error > 0} == some.keys()


def test_a_delta_of_zero_is_truncated_to_zero_without_error(tmp_path: Path) -> None:
    library, _ = library_of(tmp_path / "experts", a_seed=7)
    for name in NAMES[:2]:
        path = tmp_path / "experts" / name / "adapter_model.safetensors"
        zeros = {
            key: (kind, np.zeros(shape) if "lora_B" in key else np.frombuffer(raw, "<f4").reshape(shape))
            for key, (kind, shape, raw) in oracles.raw_tensors(path).items()
        }
        oracles.write_tensors(path, zeros)
    merged = merge(library, profile_of((1.0, 1.0)), MergeOptions(rank=2))
    truncation = record_in(merged.write(tmp_path / "out")).truncation
    assert truncation is not None
    assert truncation.total == 0
    assert all(not tensor.any() for name, tensor in merged.tensors.items() if "lora_B" in name)


def test_factor_average_is_the_rule_of_the_paper(tmp_path: Path) -> None:
    library, folders = library_of(tmp_path / "experts")
    merged = merge(library, profile_of(WEIGHTS, method="factor_average"))
    got = written_deltas(merged, tmp_path / "out")
    read = [oracles.factors(oracles.read_tensors(folder / "adapter_model.safetensors")) for folder in folders]
    for module in SHAPES:
        a = np.tensordot(WEIGHTS, [each[module][0] for each in read], 1)
        b = np.tensordot(WEIGHTS, [each[module][1] for each in read], 1)
        want = (8 / 4) / sum(WEIGHTS) * (b @ a)
        assert oracles.relative_error(got[module], want) < 2e-7
    assert merged.plan.rank == 4


def test_factor_average_divides_by_the_weights_of_all_experts(tmp_path: Path) -> None:
    some = {name: shape for name, shape in SHAPES.items() if "layers.0" in name}
    library, folders = library_of(tmp_path / "experts", shapes=(SHAPES, some, some))
    got = written_deltas(merge(library, profile_of(WEIGHTS), MergeOptions(method="factor_average")), tmp_path / "out")
    module = "model.layers.1.mlp.up_proj"  # only the first expert has it
    want = WEIGHTS[0] ** 2 / sum(WEIGHTS) * oracles.deltas(folders[0])[module]
    assert oracles.relative_error(got[module], want) < 2e-7


def test_what_is_written_is_what_peft_and_vllm_expect(tmp_path: Path) -> None:
    library, _ = library_of(tmp_path / "experts", rank=(2, 4, 3), base="org/model", revision="v2")
    folder = merge(library, profile_of(WEIGHTS, user="u1042")).write(tmp_path / "out")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 9
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["base_model_name_or_path"] == "org/model"
    assert config["revision"] == "v2"
    assert config["init_lora_weights"] is True
    assert config["inference_mode"] is True
    assert config["target_modules"] == ["down_proj", "k_proj", "q_proj", "up_proj"]
    assert config["task_type"] == "CAUSAL_LM"
    record = read_soup_record(folder)
    assert record is not None
    assert record.vllm_max_lora_rank == 16
    assert record.profile["user"] == "u1042"
    assert [(expert.name, expert.weight) for expert in record.experts] == sorted(zip(NAMES, WEIGHTS, strict=True))
    assert set(record.files) == {path.name for path in folder.iterdir()}


def test_the_record_has_the_digest_of_every_file_that_was_read(tmp_path: Path) -> None:
    from blake3 import blake3

    library, folders = library_of(tmp_path / "experts")
    record = record_in(merge(library, profile_of(WEIGHTS)).write(tmp_path / "out"))
    for expert, folder in zip(record.experts, sorted(folders), strict=True):
        assert expert.blake3 == {
            path.name: blake3(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()
        }


@pytest.mark.parametrize(("dtype", "name"), [("float32", "F32"), ("bfloat16", "BF16"), ("float16", "F16")])
def test_the_dtype_can_be_chosen(tmp_path: Path, dtype: str, name: str) -> None:
    library, _ = library_of(tmp_path / "experts")
    folder = merge(library, profile_of(WEIGHTS), MergeOptions(dtype=dtype)).write(tmp_path / "out")
    assert {kind for kind, _, _ in oracles.raw_tensors(folder / "adapter_model.safetensors").values()} == {name}


@pytest.mark.parametrize(("given", "want"), [(("F16", "F16", "F16"), "float16"), (("F16", "BF16", "F16"), "float32")])
def test_the_dtype_is_the_experts_own_where_they_agree(tmp_path: Path, given: tuple[str, ...], want: str) -> None:
    library, _ = library_of(tmp_path / "experts", dtype=given)
    assert merge(library, profile_of(WEIGHTS)).plan.dtype == want


def test_a_soup_beyond_the_dtype_is_refused(tmp_path: Path) -> None:
    library, _ = library_of(tmp_path / "experts", alpha=1e6)
    with pytest.raises(UsageError, match="beyond the range of float16") as caught:
        merge(library, profile_of(WEIGHTS), MergeOptions(dtype="float16")).write(tmp_path / "out")
    assert "dtype=float32 or dtype=bfloat16" in caught.value.mend


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_nan_and_infinity_are_refused_with_expert_and_tensor(tmp_path: Path, value: float, factor: str) -> None:
    library, folders = library_of(tmp_path / "experts")
    path = folders[1] / "adapter_model.safetensors"
    tensors = {
        name: (kind, np.frombuffer(raw, "<f4").reshape(shape).copy())
        for name, (kind, shape, raw) in oracles.raw_tensors(path).items()
    }
    name = f"base_model.model.model.layers.1.mlp.up_proj.{factor}.weight"
    tensors[name][1][1, 2] = value
    oracles.write_tensors(path, tensors)
    with pytest.raises(InputError, match=rf"{name}: the value at \[1, 2\] is {value}") as caught:
        merge(library, profile_of(WEIGHTS)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert caught.value.where == str(path.resolve()) or caught.value.where == str(path)


def test_equal_merges_have_equal_bytes(tmp_path: Path) -> None:
    library, _ = library_of(tmp_path / "experts")
    one = merge(library, profile_of(WEIGHTS), MergeOptions(rank=5)).write(tmp_path / "one")
    two = merge(ExpertLibrary.open(tmp_path / "experts"), profile_of(WEIGHTS), MergeOptions(rank=5)).write(
        tmp_path / "two"
    )
    for path in one.iterdir():
        assert path.read_bytes() == (two / path.name).read_bytes()


@pytest.mark.usefixtures("umask_022")
def test_modes_follow_the_umask(tmp_path: Path) -> None:
    library, _ = library_of(tmp_path / "experts")
    folder = merge(library, profile_of(WEIGHTS)).write(tmp_path / "out")
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_an_output_that_exists_is_refused_and_overwrite_swaps_it(tmp_path: Path) -> None:
    library, _ = library_of(tmp_path / "experts")
    merged = merge(library, profile_of(WEIGHTS))
    merged.check(tmp_path / "out")
    merged.write(tmp_path / "out")
    with pytest.raises(OutputExistsError):
        merged.check(tmp_path / "out")
    with pytest.raises(OutputExistsError):
        merged.write(tmp_path / "out")
    merged.check(tmp_path / "out", overwrite=True)
    merged.check()
    merge(library, profile_of((1.0, 1.0))).write(tmp_path / "out", overwrite=True)
    record = read_soup_record(tmp_path / "out")
    assert record is not None
    assert len(record.experts) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "out"]


@pytest.mark.parametrize("where", ["experts/one", "experts", "experts/one/inside", "link"])
def test_an_output_that_overlaps_an_expert_is_refused(tmp_path: Path, where: str) -> None:
    library, _ = library_of(tmp_path / "experts")
    (tmp_path / "link").symlink_to(tmp_path / "experts" / "one")
    (tmp_path / "experts" / "one" / "expert.json").write_text('{"side": "one"}')
    merged = merge(library, profile_of(WEIGHTS))
    with pytest.raises(UsageError, match="overlaps the input"):
        merged.check(tmp_path / where, overwrite=True)
    with pytest.raises(UsageError, match="overlaps the input"):
        merged.write(tmp_path / where, overwrite=True)
    assert (tmp_path / "experts" / "one" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(("fault", "seen"), [(OSError(28, "full"), RunError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_full_disk_and_ctrl_c_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: BaseException, seen: type[BaseException]
) -> None:
    library, _ = library_of(tmp_path / "experts")
    merged = merge(library, profile_of(WEIGHTS))
    calls = []

    def breaks(*_: object) -> int:
        calls.append(1)
        raise fault

    monkeypatch.setattr(os, "pwrite", breaks)
    with pytest.raises(seen):
        merged.write(tmp_path / "out")
    assert calls  # several threads write: more than one may meet the fault
    assert [path.name for path in tmp_path.iterdir()] == ["experts"]


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "cuda;", ""])
def test_a_device_that_is_not_there_is_a_usage_error(tmp_path: Path, device: str) -> None:
    library, _ = library_of(tmp_path / "experts")
    with pytest.raises(UsageError):
        merge(library, profile_of(WEIGHTS), MergeOptions(device=device))


@pytest.mark.parametrize(
    ("device", "options", "where"),
    [
        ("cpu", {"rank": 5}, "cpu"),
        ("cuda", {}, "cpu"),
        ("cuda", {"method": "factor_average"}, "cpu"),
        ("cuda", {"rank": 5}, "cuda"),
        ("cuda", {"method": "ties", "rank": 5}, "cuda"),
    ],
)
def test_sums_of_factors_are_computed_on_the_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, options: dict[str, Any], where: str
) -> None:
    """A GPU would slow these sums down; methods that compute more run on it."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("personalized_soups.devices._check_computes", lambda *_: None)
    library, _ = library_of(tmp_path / "experts")
    merged = merge(library, profile_of(WEIGHTS), MergeOptions(device=device, **options))
    assert merged.device.type == where
    if where == "cpu":
        assert record_in(merged.write(tmp_path / "out")).device == "cpu"


@pytest.mark.gpu
@pytest.mark.parametrize("rank", [None, 5])
def test_cpu_and_gpu_agree(tmp_path: Path, rank: int | None) -> None:
    library, _ = library_of(tmp_path / "experts")
    on_cpu = oracles.deltas(merge(library, profile_of(WEIGHTS), MergeOptions(rank=rank)).write(tmp_path / "cpu"))
    on_gpu = oracles.deltas(
        merge(library, profile_of(WEIGHTS), MergeOptions(rank=rank, device="cuda")).write(tmp_path / "gpu")
    )
    for module, delta in on_cpu.items():
        assert oracles.relative_error(on_gpu[module], delta) < 1e-6


def test_merging_imports_neither_transformers_nor_peft(tmp_path: Path) -> None:
    import subprocess
    import sys

    library_of(tmp_path / "experts")
    code = f"""
import sys
from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge
merge(ExpertLibrary.open({str(tmp_path / "experts")!r}), Profile(weights={{"one": 1.0}})).write({str(tmp_path / "o")!r})
print(*sorted(name for name in ("transformers", "peft", "safetensors", "trl") if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=280)
    assert done.stdout.split() == []
