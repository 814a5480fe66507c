from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from personalized_soups.adapters.provenance import read_soup_record
from personalized_soups.errors import DeclarationError, InputError, OutputExistsError, UsageError
from personalized_soups.files.reader import SafetensorsFile
from personalized_soups.merging.computing import one_basis
from personalized_soups.merging.writing import many, model_shards
from personalized_soups.merging.writing.many import Merged, merge_many
from personalized_soups.methods.product import BlockSums
from tests import oracles
from tests.experts import write_expert
from tests.merging.variants import MIXTURES, make_world
from tests.merging.writing.test_into_base import write_base

NAMES = ("one", "two", "three")
WEIGHTS_FILE = "adapter_model.safetensors"


def profiles_of(count: int, names: Sequence[str] = NAMES, **fields: Any) -> list[Profile]:
    """Return profiles with weights of every sign and size; every third leaves out an expert."""
    random = np.random.default_rng(7)
    found = []
    for number in range(count):
        weights = dict(zip(names, random.normal(size=len(names)).tolist(), strict=True))
        if number % 3 == 2:
            weights[names[number % len(names)]] = 0.0
        found.append(Profile(user=f"u{number}", weights=weights, **fields))
    return found


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    for index, (name, rank) in enumerate(zip(NAMES, (2, 4, 3), strict=True)):
        write_expert(tmp_path / "experts" / name, seed=index, rank=rank)
    return ExpertLibrary.open(tmp_path / "experts")


@pytest.fixture
def shared(tmp_path: Path) -> ExpertLibrary:
    for index, name in enumerate(NAMES):
        write_expert(tmp_path / "shared" / name, seed=index, a_seed=5, alpha=(8, 4, 2)[index])
    return ExpertLibrary.open(tmp_path / "shared")


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"energy": 0.6}, {"energy": 0.6, "target": "vllm"}])
def test_a_row_of_many_is_the_merge_of_one(
    tmp_path: Path, library: ExpertLibrary, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many, "_MOST_USERS", 3)  # several batches
    profiles = profiles_of(8)
    assert merge_many(library, profiles, tmp_path / "out", MergeOptions(**options)) == Merged(8, 0)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [f"u{n}" for n in range(8)]
    for profile in profiles:
        alone = merge(library, profile, MergeOptions(**options)).write(tmp_path / "alone" / profile.user)
        for path in alone.iterdir():
            assert (tmp_path / "out" / profile.user / path.name).read_bytes() == path.read_bytes(), path.name


def test_sums_of_factors_need_no_gpu(tmp_path: Path, shared: ExpertLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("personalized_soups.devices._check_computes", lambda *_: None)
    merge_many(shared, profiles_of(3), tmp_path / "cpu")
    merge_many(shared, profiles_of(3), tmp_path / "cuda", MergeOptions(device="cuda"))
    for path in (tmp_path / "cpu").rglob("*.*"):
        assert (tmp_path / "cuda" / path.relative_to(tmp_path / "cpu")).read_bytes() == path.read_bytes()
    with pytest.raises(UsageError, match="no device 'cuda:1'"):
        merge_many(shared, profiles_of(3), tmp_path / "more", MergeOptions(device="cuda:1"))


@pytest.mark.parametrize("method", ["ties", "dare_linear", "factor_ties", "knots"])
def test_every_family_of_methods_is_merged_for_many(tmp_path: Path, shared: ExpertLibrary, method: str) -> None:
    for number, name in enumerate(NAMES):
        shutil.rmtree(shared[name].folder)
        write_expert(shared[name].folder, seed=number)
    again = ExpertLibrary.open(tmp_path / "shared")
    rank: dict[str, Any] = {} if method.startswith("factor") else {"rank": 5}
    profiles = profiles_of(2, method=method)
    merge_many(again, profiles, tmp_path / "out", MergeOptions(**rank))
    for profile in profiles:
        alone = merge(again, profile, MergeOptions(**rank)).write(tmp_path / "alone" / profile.user)
        assert (tmp_path / "out" / profile.user / WEIGHTS_FILE).read_bytes() == (alone / WEIGHTS_FILE).read_bytes()


def test_one_product_for_experts_of_one_basis_owes_its_own_bound(tmp_path: Path, shared: ExpertLibrary) -> None:
    """|err| <= (E + 1) 2^-24 sum |w s B|: the weights' rounding, E products and sums."""
    profiles = profiles_of(5)
    merge_many(shared, profiles, tmp_path / "out")
    for profile in profiles:
        got = oracles.factors(oracles.read_tensors(tmp_path / "out" / profile.user / WEIGHTS_FILE))
        weights = {name: weight for name, weight in profile.weights.items() if weight}
        for module, (a, b) in got.items():
            want, room = np.zeros_like(b), np.zeros_like(b)
            for name, weight in weights.items():
                own_a, own_b = oracles.factors(oracles.read_tensors(shared[name].folder / WEIGHTS_FILE))[module]
                scaling = json.loads((shared[name].folder / "adapter_config.json").read_text())["lora_alpha"] / 4
                np.testing.assert_array_equal(a, own_a)
                want += weight * scaling * own_b
                room += np.abs(weight * scaling * own_b)
            assert (np.abs(b - want) <= (len(weights) + 1) * 2.0**-24 * room).all()


def test_the_product_is_used_for_experts_of_one_basis(
    tmp_path: Path, shared: ExpertLibrary, library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    class Counted(BlockSums):
        def blocks(self, weights_UE: Tensor, tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
            calls.append(len(weights_UE))
            return super().blocks(weights_UE, tensors)

    monkeypatch.setattr(one_basis, "BlockSums", Counted)
    whole = [Profile(user=f"u{n}", weights=dict.fromkeys(NAMES, 0.1 + n)) for n in range(4)]
    merge_many(library, whole, tmp_path / "free")
    assert not calls
    merge_many(shared, whole, tmp_path / "out")
    assert set(calls) == {4}


@pytest.mark.parametrize("method", ["factor_average", "factor_linear"])
def test_methods_of_weighted_factors_are_one_product_too(tmp_path: Path, method: str) -> None:
    """Rounded in float32 where a merge alone sums in float64: E + 2 roundings of each factor, of which the first two
    in the product of E = 3; 1e-6 of the delta's norm is 16 roundings, and factors here cancel no more than threefold.
    """
    for number, name in enumerate(NAMES):
        write_expert(tmp_path / "equal" / name, seed=number)
    equal = ExpertLibrary.open(tmp_path / "equal")
    profiles = profiles_of(4, method=method)
    merge_many(equal, profiles, tmp_path / "out")
    for profile in profiles:
        alone = oracles.deltas(merge(equal, profile).write(tmp_path / "alone" / profile.user))
        for module, delta in oracles.deltas(tmp_path / "out" / profile.user).items():
            assert oracles.relative_error(delta, alone[module]) < 1e-6


def test_a_second_run_keeps_what_is_there_and_goes_on(tmp_path: Path, library: ExpertLibrary) -> None:
    profiles = profiles_of(5)
    assert merge_many(library, profiles[:2], tmp_path / "out") == Merged(2, 0)
    before = {path: path.stat().st_ino for path in (tmp_path / "out").rglob("*")}
    assert merge_many(library, profiles, tmp_path / "out") == Merged(3, 2)
    assert {path: path.stat().st_ino for path in before} == before


def test_another_soup_in_a_users_folder_is_refused_or_replaced(tmp_path: Path, library: ExpertLibrary) -> None:
    (first,) = profiles_of(1)
    merge_many(library, [first], tmp_path / "out")
    for other, options in (
        (first.replaced(weights={"one": 1.0}), {}),
        (first, {"rank": 2}),
        (first, {"dtype": "bfloat16"}),
    ):
        with pytest.raises(OutputExistsError, match="already exists and holds another soup"):
            merge_many(library, [other], tmp_path / "out", MergeOptions(**options))
    second = first.replaced(weights={"one": 1.0})
    assert merge_many(library, [second], tmp_path / "out", overwrite=True) == Merged(1, 0)
    record = read_soup_record(tmp_path / "out" / "u0")
    assert record is not None
    assert [expert.name for expert in record.experts] == ["one"]


def test_a_changed_expert_makes_another_soup(tmp_path: Path, library: ExpertLibrary) -> None:
    profiles = profiles_of(1)
    merge_many(library, profiles, tmp_path / "out")
    shutil.rmtree(library["one"].folder)
    write_expert(library["one"].folder, seed=99, rank=2)
    with pytest.raises(OutputExistsError, match="already exists and holds another soup"):
        merge_many(ExpertLibrary.open(tmp_path / "experts"), profiles, tmp_path / "out")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("second", [{"one": 1.0, "two": 2.0}, {"three": 1.0}])
def test_two_profiles_of_one_user_are_refused_over_any_experts_and_in_any_batch(
    tmp_path: Path,
    library: ExpertLibrary,
    monkeypatch: pytest.MonkeyPatch,
    second: dict[str, float],
    overwrite: bool,
) -> None:
    monkeypatch.setattr(many, "_MOST_USERS", 2)
    profiles = [*profiles_of(5), Profile(user="u0", weights=second)]
    with pytest.raises(UsageError, match="the user 'u0' has two profiles"):
        merge_many(library, profiles, tmp_path / "out", overwrite=overwrite)


def test_a_soup_of_another_base_is_another_soup(tmp_path: Path, library: ExpertLibrary) -> None:
    one, two = write_base(tmp_path / "one", "F32"), write_base(tmp_path / "two", "BF16")
    profiles = profiles_of(1)
    merge_many(library, profiles, tmp_path / "out", into_base=one)
    with pytest.raises(OutputExistsError, match="already exists and holds another soup"):
        merge_many(library, profiles, tmp_path / "out", into_base=two)
    assert merge_many(library, profiles, tmp_path / "out", into_base=two, overwrite=True) == Merged(1, 0)
    assert merge_many(library, profiles, tmp_path / "out", into_base=two) == Merged(0, 1)


def test_a_soup_that_does_not_fit_is_told_with_its_user(tmp_path: Path, library: ExpertLibrary) -> None:
    large = Profile(user="ada", weights={"one": 1e7})
    with pytest.raises(UsageError, match=r"'ada': .* beyond the range of float16"):
        merge_many(library, [*profiles_of(1), large], tmp_path / "out", MergeOptions(dtype="float16"))


@pytest.mark.parametrize("user", ["../u", "a/b", ".hidden", "a\\b", "a\nb", "x" * 201, "a\0b"])
def test_a_user_that_cannot_be_a_folder_is_refused(tmp_path: Path, library: ExpertLibrary, user: str) -> None:
    with pytest.raises(DeclarationError, match="cannot be the name of a folder"):
        merge_many(library, [Profile(user=user, weights={"one": 1.0})], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_profile_without_a_user_is_refused(tmp_path: Path, library: ExpertLibrary) -> None:
    with pytest.raises(DeclarationError, match="does not name a user"):
        merge_many(library, [Profile(weights={"one": 1.0})], tmp_path / "out")


def test_opposed_sides_and_unknown_experts_are_refused_for_every_profile(
    tmp_path: Path, library: ExpertLibrary
) -> None:
    for side in ("friendly", "unfriendly"):
        write_expert(tmp_path / "experts" / side)
    again = ExpertLibrary.open(tmp_path / "experts")
    weights = {"friendly": 1.0, "unfriendly": 1.0}
    allowed = Profile(user="a", weights=weights, allow_opposed=True)
    with pytest.raises(DeclarationError, match="two sides of one dimension"):
        merge_many(again, [allowed, Profile(user="b", weights=weights)], tmp_path / "out")
    with pytest.raises(DeclarationError, match="no expert is called 'frendly'"):
        merge_many(again, [Profile(user="c", weights={"friendly": 1.0, "frendly": 0.0})], tmp_path / "out")


def test_weights_that_cancel_are_refused_by_a_method_that_divides(tmp_path: Path, library: ExpertLibrary) -> None:
    for number, name in enumerate(("x", "y")):
        write_expert(tmp_path / "equal" / name, seed=number)
    equal = ExpertLibrary.open(tmp_path / "equal")
    sound = Profile(user="a", method="factor_average", weights={"x": 1.0, "y": 1.0})
    with pytest.raises(UsageError, match="divides by the sum"):
        merge_many(equal, [sound, sound.replaced(user="b", weights={"x": 1.0, "y": -1.0})], tmp_path / "out")


def test_many_models_come_out_of_one_reading_of_the_base(
    tmp_path: Path, library: ExpertLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = []
    fold = model_shards._fold_tensor

    def counted(source: SafetensorsFile, name: str, *rest: Any) -> None:
        read.append(name)
        fold(source, name, *rest)

    monkeypatch.setattr(model_shards, "_fold_tensor", counted)
    base = write_base(tmp_path / "base", "BF16")
    profiles = [Profile(user=f"u{n}", weights={"one": 0.3 * n + 0.1, "two": -0.2, "three": 1.0}) for n in range(3)]
    assert merge_many(library, profiles, tmp_path / "out", into_base=base) == Merged(3, 0)
    assert len(read) == len(set(read))
    for profile in profiles:
        alone = merge_into_base(library, profile, base, tmp_path / "alone" / profile.user)
        for path in alone.glob("*.safetensors"):
            assert (tmp_path / "out" / profile.user / path.name).read_bytes() == path.read_bytes()
    assert merge_many(library, profiles, tmp_path / "out", into_base=base) == Merged(0, 3)


def test_a_fault_half_way_leaves_whole_folders_alone(tmp_path: Path, library: ExpertLibrary) -> None:
    path = library["three"].folder / WEIGHTS_FILE
    content = bytearray(path.read_bytes())
    content[-4:] = np.float32(np.nan).tobytes()
    path.write_bytes(content)
    good = Profile(user="good", weights={"one": 1.0})
    bad = Profile(user="bad", weights={"three": 1.0})
    with pytest.raises(InputError, match="nan"):
        merge_many(library, [good, bad], tmp_path / "out")
    assert [child.name for child in (tmp_path / "out").iterdir()] == ["good"]


def test_progress_counts_users(tmp_path: Path, library: ExpertLibrary) -> None:
    seen: list[int] = []
    merge_many(library, profiles_of(4), tmp_path / "out", progress=seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 4


def test_adapters_with_magnitudes_are_merged_for_many_with_their_base(tmp_path: Path) -> None:
    """DoRA needs the base, which every batch reads; each user's adapter equals that of a single merge."""
    world = make_world(tmp_path / "world", *MIXTURES["dora and plain"])
    names = list(world.library)
    profiles = [Profile(user=f"u{n}", weights=dict(zip(names, (0.7, 0.2 * n - 0.5), strict=True))) for n in range(3)]
    merge_many(world.library, profiles, tmp_path / "out", MergeOptions(base=world.base))
    for profile in profiles:
        alone = merge(world.library, profile, MergeOptions(base=world.base)).write(tmp_path / "alone" / profile.user)
        for path in alone.iterdir():
            assert (tmp_path / "out" / profile.user / path.name).read_bytes() == path.read_bytes(), path.name
