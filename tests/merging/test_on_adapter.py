"""Soups of experts that were trained on top of an SFT adapter: the adapter's delta is in the result exactly once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import (
    ExpertLibrary,
    Generator,
    LiveAdapter,
    MergeOptions,
    Profile,
    SoupModel,
    diagnose,
    merge,
    merge_into_base,
    merge_many,
    verify,
)
from personalized_soups.adapters.base_adapter import BaseAdapter
from personalized_soups.adapters.provenance import read_soup_record
from personalized_soups.errors import IncompatibleExpertsError, UnsupportedAdapterError, UsageError
from tests import oracles
from tests.base_adapters import SFT_SHAPES, bounds, float64_weights, trained_on, write_merged_base, write_sft
from tests.experts import SHAPES, write_expert

WEIGHTS = {"cold": 0.6, "warm": -0.4}
PROFILE = Profile(user="ada", weights=WEIGHTS)

# PEFT still asks transformers by the old name; nothing of ours to change
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture
def sft(tmp_path: Path) -> Path:
    return write_sft(tmp_path / "sft")


@pytest.fixture
def library(tmp_path: Path, sft: Path) -> ExpertLibrary:
    for seed, name in enumerate(WEIGHTS):
        trained_on(write_expert(tmp_path / "experts" / name, seed=seed, alpha=6), sft)
    return ExpertLibrary.open(tmp_path / "experts")


def folders(library: ExpertLibrary) -> list[Path]:
    return [library[name].folder for name in WEIGHTS]


def wanted(library: ExpertLibrary, sft: Path) -> Mapping[str, oracles.Matrix]:
    return oracles.soup([*folders(library), sft], [*WEIGHTS.values(), 1.0])


def check_deltas(folder: Path, want: Mapping[str, oracles.Matrix], tolerance: float) -> None:
    got = oracles.deltas(folder)
    assert got.keys() == want.keys()
    for module, delta in want.items():
        assert oracles.relative_error(got[module], delta) <= tolerance, module


def test_the_adapter_is_in_the_merged_adapter_once(library: ExpertLibrary, sft: Path, tmp_path: Path) -> None:
    out = merge(library, PROFILE, MergeOptions(on=sft)).write(tmp_path / "soup")
    # A is copied, and each entry of B is rounded once to float32: B A is off by at most 2^-24 sum |w s B| |A|
    want = wanted(library, sft)
    sizes = oracles.magnitudes([*folders(library), sft], [*WEIGHTS.values(), 1.0])
    got = oracles.deltas(out)
    assert got.keys() == want.keys() == {*SHAPES, *SFT_SHAPES}
    for module, delta in want.items():
        assert (np.abs(got[module] - delta) <= 2.0**-24 * sizes[module] + 1e-15).all(), module
    record = read_soup_record(out)
    assert record is not None
    assert record.on == BaseAdapter.open(sft).record
    assert record.on_folder == str(sft.resolve())
    assert record.rank == 4 + 4 + 3
    assert verify(out).is_sound


def test_peft_loads_the_merged_adapter_on_the_bare_base(
    library: ExpertLibrary, sft: Path, tmp_path: Path, small_base: Path
) -> None:
    ids_BT = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    out = merge(library, PROFILE, MergeOptions(on=sft)).write(tmp_path / "soup")
    alone = merge(library, PROFILE).write(tmp_path / "alone")
    merged_base = write_merged_base(small_base, sft, tmp_path / "merged")
    with torch.no_grad():
        got = Generator.open(small_base, out, device="cpu", fold=False).model(input_ids=ids_BT).logits
        # the soup without the adapter, on the base into which PEFT merged the adapter
        want = Generator.open(merged_base, write_bare(alone), device="cpu", fold=False).model(input_ids=ids_BT).logits
        on_top = Generator.open(small_base, alone, on=sft, device="cpu").model(input_ids=ids_BT).logits
    for logits in (got, on_top):
        assert oracles.relative_error(logits.double().numpy(), want.double().numpy()) < 1e-5


def write_bare(folder: Path) -> Path:
    """Write a copy of a merged adapter without its record, as if another program had written it."""
    copy = folder.with_name(f"{folder.name}_bare")
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("soup.json"))
    return copy


def test_the_adapter_is_in_the_merged_model_once(
    library: ExpertLibrary, sft: Path, tmp_path: Path, small_base: Path
) -> None:
    out = merge_into_base(library, PROFILE, small_base, tmp_path / "model", MergeOptions(on=sft))
    got = oracles.read_tensors(out / "model.safetensors")
    adapters, weights = [*folders(library), sft], [*WEIGHTS.values(), 1.0]
    room = bounds(small_base, adapters, weights, num_ranks=4 + 4 + 3)
    for module, matrix in float64_weights(small_base, adapters, weights).items():
        assert (np.abs(got[f"{module}.weight"] - matrix) <= room[module] + 2.0**-24 * np.abs(matrix)).all(), module
    assert verify(out).is_sound
    record = read_soup_record(out)
    assert record is not None
    assert (record.on, record.on_folder) == (BaseAdapter.open(sft).record, str(sft.resolve()))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "ties", "method_options": {"density": 0.5}, "rank": 16},
        {"method": "factor_average"},
        {"method": "knots", "method_options": {"density": 0.5}, "rank": 16},
        {"rank": 6},
        {"energy": 0.9},
    ],
)
def test_the_adapter_is_added_after_the_method_and_the_truncation(
    library: ExpertLibrary, sft: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    """Merging the experts alone and adding the adapter's delta in float64 gives the same."""
    # `rank` limits the whole adapter, so the experts' share is smaller where the adapter has ranks
    own = dict(options)
    with_on = merge(library, PROFILE, MergeOptions(on=sft, **options)).write(tmp_path / "soup")
    got = oracles.deltas(with_on)
    sft_deltas, sft_ranks = oracles.deltas(sft), {name: len(a) for name, (a, _) in factors_of(sft).items()}
    for module in {*SHAPES, *SFT_SHAPES}:
        want = sft_deltas.get(module, 0.0)
        if module in SHAPES:
            if "rank" in options:
                own["rank"] = options["rank"] - sft_ranks.get(module, 0)
            tensors = merge(library, PROFILE, MergeOptions(**own)).tensors
            a, b = (tensors[f"base_model.model.{module}.lora_{name}.weight"].double().numpy() for name in "AB")
            want = want + b @ a
        assert oracles.relative_error(got[module], np.asarray(want)) < 1e-6, module
    if "rank" in options:
        assert max(len(a) for a, _ in factors_of(with_on).values()) <= options["rank"]
    assert verify(with_on).is_sound


def factors_of(folder: Path) -> dict[str, tuple[oracles.Matrix, oracles.Matrix]]:
    return oracles.factors(oracles.read_tensors(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize(("method", "factor"), [("ties", 1), ("linear", 3)])
def test_weights_never_scale_the_adapter(
    *, library: ExpertLibrary, sft: Path, tmp_path: Path, small_base: Path, method: str, factor: int
) -> None:
    """Weights that are three times as large give three times the soup, and with ties, which averages, the same soup."""
    models = []
    for number, scale in enumerate((1.0, 3.0)):
        profile = PROFILE.replaced(weights={name: scale * weight for name, weight in WEIGHTS.items()})
        out = tmp_path / f"{number}"
        merge_into_base(library, profile, small_base, out, MergeOptions(on=sft, method=method))
        models.append(oracles.read_tensors(out / "model.safetensors"))
    bare = oracles.read_tensors(small_base / "model.safetensors")
    sft_deltas = oracles.deltas(sft)
    for module in SFT_SHAPES.keys() - SHAPES.keys():
        name = f"{module}.weight"
        assert np.array_equal(models[0][name], models[1][name])
        assert oracles.relative_error(models[0][name] - bare[name], sft_deltas[module]) < 1e-5
    for module in SFT_SHAPES.keys() & SHAPES.keys():
        name = f"{module}.weight"
        base = bare[name] + sft_deltas[module]
        assert oracles.relative_error(models[1][name] - base, factor * (models[0][name] - base)) < 1e-5


def test_without_on_the_soup_says_what_it_needs(
    library: ExpertLibrary, sft: Path, tmp_path: Path, small_base: Path
) -> None:
    merged = merge(library, PROFILE)
    assert "on top of sft (not included, so load it as well)" in merged.plan.lines()[0]
    out = merged.write(tmp_path / "soup")
    record = read_soup_record(out)
    assert record is not None
    assert (record.on, record.on_folder) == (BaseAdapter.open(sft).record, None)
    check_deltas(out, oracles.soup(folders(library), list(WEIGHTS.values())), 2.0**-23)
    assert verify(out).is_sound
    with pytest.raises(IncompatibleExpertsError, match="no adapter is given: soup: on top of sft"):
        Generator.open(small_base, out, device="cpu")
    with pytest.raises(UsageError, match="so a full model needs this adapter too") as caught:
        merge_into_base(library, PROFILE, small_base, tmp_path / "model")
    assert caught.value.mend == "give the folder of this adapter: on=sft"
    assert not (tmp_path / "model").exists()
    included = merge(library, PROFILE, MergeOptions(on=sft)).write(tmp_path / "included")
    with pytest.raises(IncompatibleExpertsError, match="included: a soup that includes sft"):
        Generator.open(small_base, included, on=sft, device="cpu")
    Generator.open(small_base, included, device="cpu")


def test_a_soup_of_a_soup_stays_on_the_adapter(library: ExpertLibrary, sft: Path, tmp_path: Path) -> None:
    """A merged adapter that does not include the adapter is an expert that needs it."""
    inner = merge(library, PROFILE).write(tmp_path / "inner")
    outer = merge(ExpertLibrary.open(inner), Profile(weights={"inner": 2.0}), MergeOptions(on=sft))
    out = outer.write(tmp_path / "outer")
    weights = [*(2 * weight for weight in WEIGHTS.values()), 1.0]
    check_deltas(out, oracles.soup([*folders(library), sft], weights), 2.0**-22)


def test_experts_of_different_adapters_are_refused(library: ExpertLibrary, sft: Path, tmp_path: Path) -> None:
    other = write_sft(tmp_path / "other", seed=5)
    for on, what in ((other, "warm: on top of other"), (None, "warm: without an adapter")):
        trained_on(tmp_path / "experts" / "warm", on)
        mixed = ExpertLibrary.open(tmp_path / "experts")
        for options in (MergeOptions(), MergeOptions(same_base=True)):
            with pytest.raises(IncompatibleExpertsError, match=what) as caught:
                merge(mixed, PROFILE, options)
            assert "cold: on top of sft" in caught.value.what
            assert caught.value.where == "cold, warm"
        (finding,) = diagnose(mixed).of_kind("base adapter")
        assert what in finding.what


def test_another_adapter_than_that_of_the_experts_is_refused(library: ExpertLibrary, tmp_path: Path) -> None:
    other = write_sft(tmp_path / "other", seed=5)
    with pytest.raises(IncompatibleExpertsError, match=r"not trained on top of the adapter that is given \(other"):
        merge(library, PROFILE, MergeOptions(on=other))
    bare = ExpertLibrary.open(*(trained_on(folder, None) for folder in folders(library)))
    with pytest.raises(IncompatibleExpertsError, match="cold: without an adapter") as caught:
        merge(bare, PROFILE, MergeOptions(on=other))
    assert caught.value.mend == "leave out on=other"


def test_an_adapter_of_another_base_is_refused(library: ExpertLibrary, sft: Path, tmp_path: Path) -> None:
    for name in WEIGHTS:
        (tmp_path / "experts" / name / "expert.json").write_text(
            json.dumps({"side": name, "base": {"name": "b", "fingerprint": "cd" * 32}})
        )
    wide = write_expert(tmp_path / "wide", shapes={"model.layers.0.self_attn.q_proj": (64, 32)})
    for folder in folders(library):
        trained_on(folder, wide)
    with pytest.raises(IncompatibleExpertsError, match=r"q_proj: cold has .*but wide has"):
        merge(ExpertLibrary.open(tmp_path / "experts"), PROFILE, MergeOptions(on=wide))
    trained_on(sft, None, base={"name": "elsewhere", "fingerprint": "ab" * 32})
    for folder in folders(library):
        trained_on(folder, sft, base={"name": "b", "fingerprint": "cd" * 32})
    with pytest.raises(IncompatibleExpertsError, match="sft was trained on base"):
        merge(ExpertLibrary.open(tmp_path / "experts"), PROFILE, MergeOptions(on=sft))


def test_ranks_that_the_adapter_alone_exceeds_are_refused(library: ExpertLibrary, sft: Path) -> None:
    with pytest.raises(UsageError, match="the base adapter alone has rank 3") as caught:
        merge(library, PROFILE, MergeOptions(on=sft, rank=3))
    assert caught.value.where == "rank"
    assert "give rank=4 or more" in caught.value.mend


def test_experts_with_whole_tensors_are_refused_on_top_of_an_adapter(
    library: ExpertLibrary, sft: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "experts" / "warm"
    tensors = {
        name: ("F32", value) for name, value in oracles.read_tensors(folder / "adapter_model.safetensors").items()
    }
    tensors["base_model.model.model.norm.weight"] = ("F32", np.ones(64))
    oracles.write_tensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["norm"]}))
    with pytest.raises(UnsupportedAdapterError, match=r"warm trained the tensor .*norm.* whole \(modules_to_save\)"):
        merge(ExpertLibrary.open(tmp_path / "experts"), PROFILE, MergeOptions(on=sft))


@pytest.mark.parametrize("shared", [False, True])
def test_many_users_get_what_each_would_get_alone(sft: Path, tmp_path: Path, small_base: Path, shared: bool) -> None:
    for seed, name in enumerate(WEIGHTS):
        folder = tmp_path / "experts" / name
        trained_on(write_expert(folder, seed=seed, alpha=6, a_seed=7 if shared else None), sft)
    library = ExpertLibrary.open(tmp_path / "experts")
    users = [PROFILE, PROFILE.replaced(user="ben", weights={"cold": 1.0, "warm": 0.3})]
    options = MergeOptions(on=sft)
    result = merge_many(library, users, tmp_path / "soups", options)
    assert (result.written, result.kept) == (2, 0)
    for profile in users:
        folder = tmp_path / "soups" / profile.user
        want = oracles.soup([*folders(library), sft], [*profile.weights.values(), 1.0])
        check_deltas(folder, want, 2.0**-22)
        assert verify(folder).is_sound
    assert merge_many(library, users, tmp_path / "soups", options).kept == 2
    # a soup without the adapter is another soup
    with pytest.raises(Exception, match="holds another soup"):
        merge_many(library, users, tmp_path / "soups")
    merge_many(library, users[:1], tmp_path / "models", options, into_base=small_base)
    merge_into_base(library, PROFILE, small_base, tmp_path / "model", options)
    name = "model.safetensors"
    assert (tmp_path / "models" / "ada" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()


def test_verify_finds_a_changed_or_moved_adapter(library: ExpertLibrary, sft: Path, tmp_path: Path) -> None:
    out = merge(library, PROFILE, MergeOptions(on=sft)).write(tmp_path / "soup")
    moved = sft.rename(tmp_path / "moved")
    with pytest.raises(Exception, match="missing from its recorded folder") as caught:
        verify(out)
    assert "on=FOLDER" in str(getattr(caught.value, "mend", ""))
    assert verify(out, on=moved).is_sound
    write_sft(sft, seed=5)
    changed = verify(out)
    assert not changed.is_sound
    assert any("not trained on top of the adapter" in fault.what for fault in changed.faults)
    with pytest.raises(UsageError, match="includes no base adapter"):
        verify(merge(library, PROFILE).write(tmp_path / "alone"), on=moved)


def test_verify_finds_another_adapter_below_experts_without_records(sft: Path, tmp_path: Path) -> None:
    library = ExpertLibrary.open(write_expert(tmp_path / "cold"))
    out = merge(library, Profile(weights={"cold": 1.0}), MergeOptions(on=sft)).write(tmp_path / "soup")
    write_sft(sft, seed=5)
    verification = verify(out)
    assert not verification.is_sound
    assert any(fault.where == "soup.json: on" for fault in verification.faults)
    assert any(not difference.is_rounding for difference in verification.differences)


def test_verify_accepts_a_b_that_was_rounded_otherwise(library: ExpertLibrary, sft: Path, tmp_path: Path) -> None:
    """Another program may have rounded s B of the adapter to the neighbouring number, but not to a far one."""
    out = merge(library, PROFILE, MergeOptions(on=sft)).write(tmp_path / "soup")
    path = out / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"  # a module of the adapter alone
    original = oracles.read_tensors(path)
    for factor, is_sound in ((1 + 2.0**-23, True), (1 + 2.0**-16, False)):
        tensors = {each: ("F32", value.astype(np.float64)) for each, value in original.items()}
        tensors[name] = ("F32", tensors[name][1] * factor)
        oracles.write_tensors(path, tensors, {"format": "pt"})
        verification = verify(out)
        assert [difference.name for difference in verification.differences] == [name]
        assert verification.differences[0].is_rounding == is_sound


def test_the_output_cannot_overwrite_the_adapter(library: ExpertLibrary, sft: Path) -> None:
    with pytest.raises(UsageError, match="overlaps the input folder"):
        merge(library, PROFILE, MergeOptions(on=sft)).write(sft / "soup")


def test_bfloat16_is_the_rounding_of_float32(library: ExpertLibrary, sft: Path) -> None:
    wide = merge(library, PROFILE, MergeOptions(on=sft)).tensors
    narrow = merge(library, PROFILE, MergeOptions(on=sft, dtype="bfloat16")).tensors
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        assert torch.equal(tensor.to(torch.bfloat16), narrow[name]), name


def test_a_live_soup_goes_on_a_model_with_the_adapter(library: ExpertLibrary, sft: Path, small_base: Path) -> None:
    ids_BT = torch.randint(6, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    live = LiveAdapter(library, device="cpu")
    model = live.attach(Generator.open(small_base, on=sft, device="cpu").model).eval()
    mixed = SoupModel.from_pretrained(small_base, library, on=sft, device="cpu")
    with torch.no_grad():
        live.set(PROFILE)
        with mixed.mixture(WEIGHTS):
            want = mixed(input_ids=ids_BT).logits
        assert oracles.relative_error(model(input_ids=ids_BT).logits.numpy(), want.numpy()) < 1e-5
        live.zero()
        want = Generator.open(small_base, on=sft, device="cpu").model(input_ids=ids_BT).logits
        assert oracles.relative_error(model(input_ids=ids_BT).logits.numpy(), want.numpy()) < 1e-6
