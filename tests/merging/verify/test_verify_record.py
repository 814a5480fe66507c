from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.merging.verify.folder import verify
from tests import oracles
from tests.experts import SHAPES, write_expert
from tests.merging.verify.tampering import (
    NAMES,
    PROFILE,
    WEIGHTS_FILE,
    change_bits,
    check_sound,
    edit,
    faults_of,
    flipped,
    library_in,
    nudged,
)
from tests.merging.writing.test_into_base import write_base


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    return library_in(tmp_path / "experts")


def test_a_retrained_expert_is_a_fault_by_its_digest(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    write_expert(tmp_path / "experts" / "two", seed=77, rank=4)
    verification = verify(out)
    assert verification.verdict == "different"
    ((where, what),) = faults_of(verification).items()
    assert where == f"expert {tmp_path / 'experts' / 'two' / WEIGHTS_FILE}"
    assert what.startswith("has changed since the merge: BLAKE3 ")
    # an expert of another rank: the shapes differ, and the changed file is still reported
    write_expert(tmp_path / "experts" / "two", seed=77, rank=5)
    assert "expert" in " ".join(faults_of(verify(out)))


def test_an_expert_that_no_longer_fits_is_a_fault_with_the_reason(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    write_expert(tmp_path / "experts" / "two", rank=4, shapes={"model.layers.0.self_attn.q_proj": (8, 8)})
    verification = verify(out)
    assert verification.verdict == "not recomputed"
    faults = faults_of(verification)
    assert any(where.startswith("expert ") for where in faults)
    assert any("the soup cannot be computed again" in what for what in faults.values())


def test_swapped_experts_are_faults(tmp_path: Path) -> None:
    library = library_in(tmp_path / "experts", ranks=(4, 4, 4))
    out = merge(library, PROFILE).write(tmp_path / "out")
    (tmp_path / "experts" / "one").rename(tmp_path / "kept")
    (tmp_path / "experts" / "two").rename(tmp_path / "experts" / "one")
    (tmp_path / "kept").rename(tmp_path / "experts" / "two")
    verification = verify(out)
    assert verification.verdict == "different"
    assert {where.rpartition("/")[0].rpartition("/")[2] for where in faults_of(verification)} == {"one", "two"}


def test_experts_that_have_moved_are_found_by_name(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE, MergeOptions(method="dare_linear", rank=4)).write(tmp_path / "out")
    (tmp_path / "experts").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="missing from their recorded folders: ") as caught:
        verify(out)
    assert all(str(tmp_path / "experts" / name) in caught.value.what for name in NAMES)
    assert "experts=FOLDER" in caught.value.mend
    check_sound(verify(out, experts=tmp_path / "elsewhere"))
    check_sound(verify(out, experts=[tmp_path / "elsewhere" / name for name in NAMES]))


def test_a_moved_base_can_be_given_and_another_base_is_a_fault(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        verify(out)
    assert "base=BASE" in caught.value.mend
    check_sound(verify(out, base=tmp_path / "elsewhere"))
    change_bits(tmp_path / "elsewhere" / "model.safetensors", "model.embed_tokens.weight", flipped(30))
    verification = verify(out, base=tmp_path / "elsewhere")
    assert verification.verdict == "different"
    faults = faults_of(verification)
    assert faults[f"base {tmp_path / 'elsewhere' / 'model.safetensors'}"].startswith("has changed since")
    assert faults[f"base {tmp_path / 'elsewhere'}"].startswith("is another base")


def test_an_edited_weight_in_the_record_is_a_fault(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    kept = (out / "soup.json").read_text()
    edit(out / "soup.json", "experts", 0, "weight", to=0.8)
    verification = verify(out)
    assert verification.verdict == "identical"
    assert faults_of(verification) == {"record soup.json: the weight of one": "is 0.8, but the profile gives 0.7"}
    (out / "soup.json").write_text(kept)
    edit(out / "soup.json", "profile", "weights", "one", to=0.8)
    verification = verify(out)
    assert (verification.verdict, verification.num_different) == ("different", len(SHAPES))  # every B
    (out / "soup.json").write_text(kept)
    edit(out / "soup.json", "profile", "weights", to={"one": 0.7, "four": 1.0})
    verification = verify(out)
    assert verification.verdict == "not recomputed"
    assert "the profile has weights for four, one" in " ".join(faults_of(verification).values())


@pytest.mark.parametrize(
    ("keys", "to", "where"),
    [
        (("rank",), 4, "expected torch.float32 [4, 64]"),
        (("vllm_max_lora_rank",), 16, "soup.json: vllm_max_lora_rank"),
        (("base", "name"), "another", "base"),
        (("truncation", "total"), 0.0, "soup.json: truncation: total"),
        (("truncation", "modules", "model.layers.0.mlp.up_proj"), 0.9, "model.layers.0.mlp.up_proj"),
        (("truncation",), None, "soup.json: encoding"),
        (("options",), {"density": 0.5}, "the soup cannot"),
    ],
)
def test_every_other_edited_key_of_the_record_is_a_fault(
    tmp_path: Path, library: ExpertLibrary, keys: tuple[str, ...], to: Any, where: str
) -> None:
    out = merge(library, PROFILE, MergeOptions(rank=3)).write(tmp_path / "out")
    edit(out / "soup.json", *keys, to=to)
    assert where in " ".join(f"{place} {what}" for place, what in faults_of(verify(out)).items())


@pytest.mark.parametrize(("key", "to"), [("lora_alpha", 18), ("use_rslora", True), ("extra_key", 1)])
def test_an_edited_configuration_is_a_fault(tmp_path: Path, library: ExpertLibrary, key: str, to: Any) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    edit(out / "adapter_config.json", key, to=to)
    verification = verify(out)
    assert verification.verdict == "identical"
    expected = {"lora_alpha": 9, "use_rslora": False, "extra_key": None}[key]
    assert faults_of(verification) == {f"configuration adapter_config.json: {key}": f"is {to!r}, expected {expected!r}"}


def test_missing_and_extra_files_are_faults(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    (out / ".hidden").mkdir()
    (out / ".hidden" / "file").write_text("")
    check_sound(verify(out))
    (out / "extra.bin").write_text("")
    (out / "adapter_config.json").unlink()
    (out / WEIGHTS_FILE).unlink()
    verification = verify(out)
    assert verification.verdict == "not recomputed"
    assert faults_of(verification) == {
        f"file {WEIGHTS_FILE}": "is missing",
        "file adapter_config.json": "is missing",
        "file extra.bin": "was not written by the merge",
    }


def test_missing_and_edited_files_of_a_model_are_faults(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=2), tmp_path / "out")
    (out / "model-00002-of-00002.safetensors").unlink()
    (out / "extra" / "notes.txt").unlink()
    (out / "config.json").write_text('{"model_type": "other"}')
    faults = faults_of(verify(out))
    assert faults == {
        "file model-00002-of-00002.safetensors": "is missing",
        "file extra/notes.txt": "is missing",
        "configuration config.json": "differs from the base's",
    }


def test_missing_extra_and_other_tensors_are_faults(tmp_path: Path, library: ExpertLibrary) -> None:
    adapter = merge(library, PROFILE).write(tmp_path / "adapter")
    base = write_base(tmp_path / "base", shards=1)
    model = merge_into_base(library, PROFILE, base, tmp_path / "model")
    down, up = (f"base_model.model.model.layers.1.mlp.{name}_proj.lora_B.weight" for name in ("down", "up"))
    for path, names in (
        (adapter / WEIGHTS_FILE, (down, up)),
        (model / "model.safetensors", ("model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight")),
    ):
        tensors = {name: ("F32", values) for name, values in oracles.read_tensors(path).items()}
        del tensors[names[0]]
        tensors[names[1]] = ("F16", tensors[names[1]][1])
        tensors["another"] = ("F32", np.zeros(3))
        oracles.write_tensors(path, tensors, {"format": "np"})
        verification = verify(path.parent)
        assert verification.verdict == "different"
        faults = faults_of(verification)
        assert {where.partition(" ")[2] for where in faults} == {names[0], names[1], "another", path.name}
        assert "missing" in faults[f"tensor {names[0]}"]
        assert "16" in faults[f"tensor {names[1]}"]
        assert "does not belong to" in faults["tensor another"]
        assert "metadata" in faults[f"configuration {path.name}"]


def test_a_damaged_folder_or_one_without_a_record_is_an_error(tmp_path: Path, library: ExpertLibrary) -> None:
    with pytest.raises(InputError, match="the folder does not exist"):
        verify(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no soup\.json"):
        verify(tmp_path / "experts" / "one")
    out = merge(library, PROFILE).write(tmp_path / "out")
    content = (out / WEIGHTS_FILE).read_bytes()
    (out / WEIGHTS_FILE).write_bytes(content[:-4])
    with pytest.raises(FileFormatError):
        verify(out)
    (out / WEIGHTS_FILE).write_bytes(content)
    (out / "soup.json").write_text("{")
    with pytest.raises(FileFormatError):
        verify(out)


def test_nothing_is_written(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base"), tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    verify(out)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_copy_of_the_folder_is_sound(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    check_sound(verify(shutil.copytree(out, tmp_path / "copy")))


@pytest.mark.parametrize("shards", [1, 2])
def test_the_tables_and_the_new_tensor_of_an_untied_model_are_compared(tmp_path: Path, shards: int) -> None:
    write_expert(tmp_path / "experts" / "one", shapes={"lm_head": (50, 64)})
    base = write_base(tmp_path / "base", shards=shards, config={"tie_word_embeddings": True})
    profile = Profile(weights={"one": 0.5})
    out = merge_into_base(ExpertLibrary.open(tmp_path / "experts"), profile, base, tmp_path / "out")
    check_sound(verify(out))
    edit(out / "soup.json", "untied", to=None)
    edit(out / "config.json", "tie_word_embeddings", to=True)
    file = next(path for path in out.glob("*.safetensors") if "lm_head.weight" in oracles.read_tensors(path))
    change_bits(file, "lm_head.weight", nudged)
    change_bits(file, "model.embed_tokens.weight", nudged)
    verification = verify(out)
    assert faults_of(verification) == {
        "configuration config.json": "differs from the base's with untied embeddings",
        "record soup.json: untied": "is None, expected 'lm_head.weight'",
    }
    # a copied tensor must be equal; a computed tensor may differ by an ulp
    assert {difference.name: difference.is_rounding for difference in verification.differences} == {
        "lm_head.weight": True,
        "model.embed_tokens.weight": False,
    }
