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
    flipped,
    library_in,
    nudged,
    told,
)
from tests.merging.writing.test_into_base import write_base


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    return library_in(tmp_path / "experts")


def test_a_retrained_expert_is_told_by_its_digest(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    write_expert(tmp_path / "experts" / "two", seed=77, rank=4)
    found = verify(out)
    assert found.verdict == "different"
    ((where, what),) = told(found).items()
    assert where == f"expert {tmp_path / 'experts' / 'two' / WEIGHTS_FILE}"
    assert what.startswith("has changed since: BLAKE3 ")
    # of other ranks even: what is asked for cannot be computed into the same shapes, and no error hides why
    write_expert(tmp_path / "experts" / "two", seed=77, rank=5)
    assert "expert" in " ".join(told(verify(out)))


def test_an_expert_by_which_nothing_can_be_planned_is_told_beside_why(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    write_expert(tmp_path / "experts" / "two", rank=4, shapes={"model.layers.0.self_attn.q_proj": (8, 8)})
    found = verify(out)
    assert found.verdict == "not recomputed"
    faults = told(found)
    assert any(where.startswith("expert ") for where in faults)
    assert any("the soup cannot be computed again" in what for what in faults.values())


def test_swapped_experts_are_told(tmp_path: Path) -> None:
    library = library_in(tmp_path / "experts", ranks=(4, 4, 4))
    out = merge(library, PROFILE).write(tmp_path / "out")
    (tmp_path / "experts" / "one").rename(tmp_path / "kept")
    (tmp_path / "experts" / "two").rename(tmp_path / "experts" / "one")
    (tmp_path / "kept").rename(tmp_path / "experts" / "two")
    found = verify(out)
    assert found.verdict == "different"
    assert {where.rpartition("/")[0].rpartition("/")[2] for where in told(found)} == {"one", "two"}


def test_experts_that_have_moved_are_found_by_name(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE, MergeOptions(method="dare_linear", rank=4)).write(tmp_path / "out")
    (tmp_path / "experts").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not where they were: ") as caught:
        verify(out)
    assert all(str(tmp_path / "experts" / name) in caught.value.what for name in NAMES)
    assert "experts=FOLDER" in caught.value.mend
    check_sound(verify(out, experts=tmp_path / "elsewhere"))
    check_sound(verify(out, experts=[tmp_path / "elsewhere" / name for name in NAMES]))


def test_a_base_that_has_moved_is_given_and_another_one_is_told(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        verify(out)
    assert "base=BASE" in caught.value.mend
    check_sound(verify(out, base=tmp_path / "elsewhere"))
    change_bits(tmp_path / "elsewhere" / "model.safetensors", "model.embed_tokens.weight", flipped(30))
    found = verify(out, base=tmp_path / "elsewhere")
    assert found.verdict == "different"
    faults = told(found)
    assert faults[f"base {tmp_path / 'elsewhere' / 'model.safetensors'}"].startswith("has changed since")
    assert faults[f"base {tmp_path / 'elsewhere'}"].startswith("is another base")


def test_an_edited_weight_in_the_record_is_told(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    kept = (out / "soup.json").read_text()
    edit(out / "soup.json", "experts", 0, "weight", to=0.8)
    found = verify(out)
    assert found.verdict == "identical"
    assert told(found) == {"record soup.json: the weight of one": "says 0.8, the profile gives 0.7"}
    (out / "soup.json").write_text(kept)
    edit(out / "soup.json", "profile", "weights", "one", to=0.8)
    found = verify(out)
    assert (found.verdict, found.num_different) == ("different", len(SHAPES))  # every B
    (out / "soup.json").write_text(kept)
    edit(out / "soup.json", "profile", "weights", to={"one": 0.7, "four": 1.0})
    found = verify(out)
    assert found.verdict == "not recomputed"
    assert "the profile weighs four, one" in " ".join(told(found).values())


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
def test_every_other_claim_of_the_record_is_held_against_what_it_comes_to(
    tmp_path: Path, library: ExpertLibrary, keys: tuple[str, ...], to: Any, where: str
) -> None:
    out = merge(library, PROFILE, MergeOptions(rank=3)).write(tmp_path / "out")
    edit(out / "soup.json", *keys, to=to)
    assert where in " ".join(f"{place} {what}" for place, what in told(verify(out)).items())


@pytest.mark.parametrize(("key", "to"), [("lora_alpha", 18), ("use_rslora", True), ("extra_key", 1)])
def test_an_edited_configuration_is_told(tmp_path: Path, library: ExpertLibrary, key: str, to: Any) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    edit(out / "adapter_config.json", key, to=to)
    found = verify(out)
    assert found.verdict == "identical"
    expected = {"lora_alpha": 9, "use_rslora": False, "extra_key": None}[key]
    assert told(found) == {f"configuration adapter_config.json: {key}": f"is {to!r}, expected {expected!r}"}


def test_missing_and_extra_files_are_told(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    (out / ".hidden").mkdir()
    (out / ".hidden" / "file").write_text("")
    check_sound(verify(out))
    (out / "extra.bin").write_text("")
    (out / "adapter_config.json").unlink()
    (out / WEIGHTS_FILE).unlink()
    found = verify(out)
    assert found.verdict == "not recomputed"
    assert told(found) == {
        f"file {WEIGHTS_FILE}": "is missing",
        "file adapter_config.json": "is missing",
        "file extra.bin": "was not written by the merge",
    }


def test_missing_and_edited_files_of_a_model_are_told(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=2), tmp_path / "out")
    (out / "model-00002-of-00002.safetensors").unlink()
    (out / "extra" / "notes.txt").unlink()
    (out / "config.json").write_text('{"model_type": "other"}')
    faults = told(verify(out))
    assert faults == {
        "file model-00002-of-00002.safetensors": "is missing",
        "file extra/notes.txt": "is missing",
        "configuration config.json": "is not the base's",
    }


def test_tensors_that_are_missing_extra_or_of_another_kind_are_told(tmp_path: Path, library: ExpertLibrary) -> None:
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
        found = verify(path.parent)
        assert found.verdict == "different"
        kinds = {where.partition(" ")[2]: what.partition(" ")[0] + what[-12:] for where, what in told(found).items()}
        assert kinds.keys() == {names[0], names[1], "another", path.name}
        faults = told(found)
        assert "missing" in faults[f"tensor {names[0]}"]
        assert "16" in faults[f"tensor {names[1]}"]
        assert "no tensor of" in faults["tensor another"]
        assert "metadata" in faults[f"configuration {path.name}"]


def test_a_folder_that_is_no_soup_or_is_damaged_is_refused(tmp_path: Path, library: ExpertLibrary) -> None:
    with pytest.raises(InputError, match="no such folder"):
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


def test_a_copy_of_the_folder_is_as_good(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    check_sound(verify(shutil.copytree(out, tmp_path / "copy")))


@pytest.mark.parametrize("shards", [1, 2])
def test_an_untied_model_is_held_to_its_tables_and_its_new_tensor(tmp_path: Path, shards: int) -> None:
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
    found = verify(out)
    assert told(found) == {
        "configuration config.json": "is not the base's, untied",
        "record soup.json: untied": "is None, expected 'lm_head.weight'",
    }
    # what is copied owes nothing, what is computed owes an ulp
    assert {each.name: each.is_rounding for each in found.differences} == {
        "lm_head.weight": True,
        "model.embed_tokens.weight": False,
    }
