from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import ExpertLibrary, Profile, merge, merge_into_base
from personalized_soups.errors import FileFormatError, InputError
from personalized_soups.merging.folding import Dense, Product, Rescale, Term, Toward, TowardRows
from personalized_soups.merging.many import merge_many
from personalized_soups.merging.verification import Verification
from personalized_soups.merging.verify import verify
from personalized_soups.merging.verify_model import magnitude_of
from tests import oracles
from tests.experts import SHAPES, write_expert
from tests.merging.test_into_base import write_base

NAMES = ("one", "two", "three")
WEIGHTS = (0.7, -0.4, 1.3)
PROFILE = Profile(weights=dict(zip(NAMES, WEIGHTS, strict=True)))
WEIGHTS_FILE = "adapter_model.safetensors"
Q_PROJ = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"

_BITS = {"F32": "<u4", "BF16": "<u2", "F16": "<u2"}


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    return library_in(tmp_path / "experts")


def library_in(root: Path, *, ranks: tuple[int, ...] = (2, 4, 3), **options: Any) -> ExpertLibrary:
    for index, (name, rank) in enumerate(zip(NAMES, ranks, strict=True)):
        write_expert(root / name, seed=index, rank=rank, **options)
    return ExpertLibrary.open(root)


def change_bits(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    """Rewrite one tensor's bits in place; `change` is given them as whole numbers."""
    content = bytearray(path.read_bytes())
    header, data = oracles.split_file(path)
    entry = header[name]
    start, end = (len(content) - len(data) + offset for offset in entry["data_offsets"])
    bits = np.frombuffer(bytes(content[start:end]), _BITS[entry["dtype"]])
    content[start:end] = change(bits).astype(bits.dtype).tobytes()
    path.write_bytes(content)


def nudged(bits: Any) -> Any:
    """One ulp further from zero, every element."""
    return bits + 1


def flipped(bit: int, index: int = 5) -> Callable[[Any], Any]:
    def change(bits: Any) -> Any:
        found = bits.copy()
        found[index] ^= 1 << bit
        return found

    return change


def edit(path: Path, *keys: str | int, to: Any) -> None:
    table = json.loads(path.read_text())
    inner = table
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(table))


def check_sound(found: Verification, verdict: str = "identical") -> None:
    assert (found.verdict, found.faults) == (verdict, ())
    assert found.is_sound


def told(found: Verification) -> dict[str, str]:
    """Return every fault's place and text; none of them leaves the folder sound."""
    assert found.faults
    assert not found.is_sound
    return {f"{fault.subject} {fault.where}": fault.what for fault in found.faults}


SOUND: Mapping[str, Mapping[str, Any]] = {
    "stacked": {},
    "truncated": {"rank": 3},
    "energy": {"energy": 0.9},
    "vllm": {"energy": 0.9, "target": "vllm"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16 truncated": {"rank": 3, "dtype": "float16"},
    "knots": {"method": "knots"},
    "random": {"method": "dare_ties", "options": {"seed": 3, "density": 0.3}, "rank": 5},
    "dense with an energy share": {"method": "ties@paper", "energy": 0.8},
}


@pytest.mark.parametrize("options", SOUND.values(), ids=SOUND.keys())
def test_an_adapter_as_it_was_written_is_identical(
    tmp_path: Path, library: ExpertLibrary, options: Mapping[str, Any]
) -> None:
    out = merge(library, PROFILE, **options).write(tmp_path / "out")
    found = verify(out)
    check_sound(found)
    assert (found.kind, found.num_tensors, found.differences) == ("adapter", 2 * len(SHAPES), ())
    assert found.as_json()["sound"] is True


@pytest.mark.parametrize("method", ["factor_average", "factor_linear", "factor_ties", "factor_dare_linear"])
def test_factor_methods_are_identical_and_one_ulp_off_is_rounding(tmp_path: Path, method: str) -> None:
    library = library_in(tmp_path / "experts", ranks=(4, 4, 4))
    out = merge(library, PROFILE, method=method).write(tmp_path / "out")
    check_sound(verify(out))
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("A"), nudged)
    found = verify(out)
    check_sound(found, "equal to rounding")
    assert [each.name for each in found.differences] == [Q_PROJ.format("A")]


def test_a_profile_with_a_rank_of_its_own_an_idle_expert_and_a_sum_is_recomputed(
    tmp_path: Path, library: ExpertLibrary
) -> None:
    profile = Profile(weights={"two": 2.0, "three": 0.0, "one": 1.0}, normalize="sum", rank=3)
    check_sound(verify(merge(library, profile).write(tmp_path / "own")))
    # an option overrides the profile's rank, here by more than there is: nothing is truncated
    check_sound(verify(merge(library, profile, rank=100).write(tmp_path / "overridden")))


@pytest.mark.parametrize("options", [{}, {"method": "dare_linear", "rank": 4}, {"rank": 3}, {"energy": 0.9}])
@pytest.mark.parametrize("a_seed", [None, 7])
def test_folders_that_merge_many_writes_are_sound(
    tmp_path: Path, options: Mapping[str, Any], a_seed: int | None
) -> None:
    library = library_in(tmp_path / "experts", ranks=(4, 4, 4), a_seed=a_seed)
    weights = {"first": dict(PROFILE.weights), "second": {"three": 0.2, "one": 0.9, "two": -0.1}}
    profiles = [Profile(user=user, weights=each) for user, each in weights.items()]
    merge_many(library, profiles, tmp_path / "out", **options)
    for user in weights:
        found = verify(tmp_path / "out" / user)
        assert found.is_sound, found
        # several users' sums over one basis come out of one product in float32
        assert found.verdict == "identical" or (a_seed is not None and not options), found


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("options", [{}, {"method": "della", "options": {"seed": 1}}, {"method": "knots"}])
def test_a_model_as_it_was_written_is_identical(
    tmp_path: Path, library: ExpertLibrary, dtype: str, options: Mapping[str, Any]
) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", dtype), tmp_path / "out", **options)
    steps: list[tuple[int, int]] = []
    found = verify(out, progress=lambda done, total: steps.append((done, total)))
    check_sound(found)
    assert (found.kind, found.num_tensors) == ("model", 1 + 2 * len(SHAPES))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"rank": 3, "dtype": "bfloat16"}, {"dtype": "float16"}])
def test_one_ulp_in_every_element_of_b_is_rounding(
    tmp_path: Path, library: ExpertLibrary, options: Mapping[str, Any]
) -> None:
    out = merge(library, PROFILE, **options).write(tmp_path / "out")
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("B"), nudged)
    found = verify(out)
    check_sound(found, "equal to rounding")
    assert (found.num_rounded, found.num_different) == (1, 0)
    # an ulp is between eps / 2 and eps of its value
    eps = 2 * oracles.HALF_ULP[{"bfloat16": "BF16", "float16": "F16"}.get(str(options.get("dtype")), "F32")]
    assert found.differences[0].relative is not None
    assert eps / 8 < found.differences[0].relative < eps


def test_sixteen_ulps_are_no_rounding_and_an_a_of_a_stack_owes_nothing(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    kept = (out / WEIGHTS_FILE).read_bytes()
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("B"), lambda bits: bits + 16)
    assert verify(out).verdict == "different"
    (out / WEIGHTS_FILE).write_bytes(kept)
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("A"), flipped(0))
    found = verify(out)
    assert (found.verdict, found.num_different, found.is_sound) == ("different", 1, False)


def test_factors_turned_alike_are_the_same_delta(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE, rank=3).write(tmp_path / "out")
    path = out / WEIGHTS_FILE
    tensors = oracles.read_tensors(path)
    random = np.random.default_rng(0)
    for a, b in ((name, name.replace("lora_A", "lora_B")) for name in list(tensors) if "lora_A" in name):
        turn = np.linalg.qr(random.normal(size=(3, 3)))[0]
        tensors[a], tensors[b] = turn @ tensors[a], tensors[b] @ turn.T
    oracles.write_tensors(path, {name: ("F32", tensor) for name, tensor in tensors.items()}, {"format": "pt"})
    check_sound(verify(out), "equal to rounding")


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("options", [{}, {"method": "ties"}])
def test_one_ulp_in_a_model_is_rounding_and_more_is_not(
    tmp_path: Path, library: ExpertLibrary, dtype: str, options: Mapping[str, Any]
) -> None:
    base = write_base(tmp_path / "base", dtype, shards=1)
    out = merge_into_base(library, PROFILE, base, tmp_path / "out", **options)
    name = "model.layers.1.mlp.up_proj.weight"
    change_bits(out / "model.safetensors", name, nudged)
    found = verify(out)
    check_sound(found, "equal to rounding")
    assert [each.name for each in found.differences] == [name]
    # the bound is an eps and 2 * 11 * 2^-24 of a sum of magnitudes, 12 * 2^-23 at most; an ulp is at least half an eps,
    # and where nothing cancels that sum is near the value: there these are beyond it by a factor of two
    change_bits(out / "model.safetensors", name, lambda bits: bits + (64 if dtype == "F32" else 8))
    found = verify(out)
    assert (found.verdict, found.num_different) == ("different", 1)


def test_a_tensor_that_the_soup_does_not_touch_owes_nothing(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    before = oracles.read_tensors(out / "model.safetensors")
    change_bits(out / "model.safetensors", "model.embed_tokens.weight", flipped(0))
    after = oracles.read_tensors(out / "model.safetensors")
    (different,) = verify(out).differences
    apart = after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]
    assert (different.name, different.is_rounding) == ("model.embed_tokens.weight", False)
    assert different.largest == np.abs(apart).max()


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"energy": 0.9}])
def test_one_flipped_bit_is_told_with_its_size(
    tmp_path: Path, library: ExpertLibrary, options: Mapping[str, Any]
) -> None:
    out = merge(library, PROFILE, **options).write(tmp_path / "out")
    before, deltas = oracles.read_tensors(out / WEIGHTS_FILE), oracles.deltas(out)
    name = Q_PROJ.format("B")
    change_bits(out / WEIGHTS_FILE, name, flipped(23))  # the exponent's lowest bit: twice or half the value
    after, changed = oracles.read_tensors(out / WEIGHTS_FILE), oracles.deltas(out)
    found = verify(out)
    assert (found.verdict, found.num_rounded, found.num_different) == ("different", 0, 1)
    (different,) = found.differences
    assert different.largest == pytest.approx(np.abs(after[name] - before[name]).max(), rel=1e-12)
    module = "model.layers.0.self_attn.q_proj"
    # a stack is compared factor by factor, what is truncated by its products
    want = (
        oracles.relative_error(changed[module], deltas[module])
        if options
        else oracles.relative_error(after[name], before[name])
    )
    assert different.relative == pytest.approx(want, rel=1e-6)


def test_nan_is_different_and_fits_into_json(tmp_path: Path, library: ExpertLibrary) -> None:
    for number, options in enumerate(({}, {"rank": 3})):
        out = merge(library, PROFILE, **options).write(tmp_path / f"adapter{number}")  # type: ignore[arg-type]
        change_bits(out / WEIGHTS_FILE, Q_PROJ.format("B"), lambda bits: bits | 0x7FC00000)
        found = verify(out)
        assert found.verdict == "different"
        assert [(each.largest, each.relative) for each in found.differences] == [(None, None)]
        json.dumps(found.as_json(), allow_nan=False)
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    change_bits(out / "model.safetensors", "model.layers.0.mlp.up_proj.weight", lambda bits: bits | 0x7FC00000)
    assert [each.largest for each in verify(out).differences] == [None]


def test_at_most_eight_tensors_are_told_and_the_worst_first(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    tensors = oracles.read_tensors(out / WEIGHTS_FILE)
    for number, name in enumerate(tensors):
        tensors[name] = tensors[name] * (1 + 2.0 ** -(number + 1))
    oracles.write_tensors(out / WEIGHTS_FILE, {k: ("F32", v) for k, v in tensors.items()}, {"format": "pt"})
    found = verify(out)
    assert found.num_different == 2 * len(SHAPES)
    assert [each.relative for each in found.differences] == pytest.approx(
        [2.0 ** -(number + 1) for number in range(8)], rel=1e-3
    )


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
    out = merge(library, PROFILE, method="dare_linear", rank=4).write(tmp_path / "out")
    (tmp_path / "experts").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="not where they were: ") as caught:
        verify(out)
    assert all(str(tmp_path / "experts" / name) in caught.value.what for name in NAMES)
    assert "--experts" in caught.value.mend
    check_sound(verify(out, experts=tmp_path / "elsewhere"))
    check_sound(verify(out, experts=[tmp_path / "elsewhere" / name for name in NAMES]))


def test_a_base_that_has_moved_is_given_and_another_one_is_told(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError) as caught:
        verify(out)
    assert "--base" in caught.value.mend
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
    out = merge(library, PROFILE, rank=3).write(tmp_path / "out")
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


def test_an_expert_with_magnitudes_is_recomputed_and_bounded(tmp_path: Path) -> None:
    folder = write_expert(tmp_path / "experts" / "one", use_dora=True)
    random = np.random.default_rng(1)
    tensors = {name: ("F32", values) for name, values in oracles.read_tensors(folder / WEIGHTS_FILE).items()}
    for module, (out_features, _) in SHAPES.items():
        name = f"base_model.model.{module}.lora_magnitude_vector"
        tensors[name] = ("F32", 1 + random.random(out_features))
    oracles.write_tensors(folder / WEIGHTS_FILE, tensors, {"format": "pt"})
    base = write_base(tmp_path / "base", shards=1)
    profile = Profile(weights={"one": 0.7})
    out = merge_into_base(ExpertLibrary.open(tmp_path / "experts"), profile, base, tmp_path / "out")
    check_sound(verify(out))
    change_bits(out / "model.safetensors", "model.layers.0.mlp.down_proj.weight", nudged)
    check_sound(verify(out), "equal to rounding")
    change_bits(out / "model.safetensors", "model.layers.0.mlp.down_proj.weight", lambda bits: bits + 64)
    assert verify(out).verdict == "different"


def test_the_magnitudes_of_every_term_are_sums_of_absolute_values() -> None:
    random = np.random.default_rng(0)
    base, delta, value = (random.normal(size=(6, 4)) for _ in range(3))
    left, right, rows = random.normal(size=(3, 2)), random.normal(size=(2, 4)), [4, 1]
    scale = 1 + random.normal(size=6)
    size = np.abs(base)
    product, some = np.zeros((6, 4)), np.zeros((6, 4))
    product[2:5] = np.abs(left) @ np.abs(right)
    some[rows] = 0.3 * (np.abs(value[rows]) + size[rows])
    terms: list[tuple[Term, Any]] = [
        (Product(torch.tensor(left), torch.tensor(right), first=2), product),
        (Dense(torch.tensor(delta)), np.abs(delta)),
        (Toward(torch.tensor(value), -0.7), 0.7 * (np.abs(value) + size)),
        (TowardRows(torch.tensor(rows), torch.tensor(value[rows]), -0.3), some),
        (Rescale(torch.tensor(scale), 0), np.abs(scale - 1)[:, None] * size),
        (Rescale(torch.tensor(scale[:4]), 1), np.abs(scale[:4] - 1) * size),
    ]
    for term, want in terms:
        total = torch.zeros(6, 4, dtype=torch.float64)
        magnitude_of(term).add(total, torch.tensor(-size), 0)
        np.testing.assert_allclose(total.numpy(), want, rtol=1e-12)
