from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from personalized_soups import ExpertLibrary, MergeOptions, Profile, merge, merge_into_base
from personalized_soups.merging.computing.terms import Dense, Product, Rescale, Term, Toward, TowardRows
from personalized_soups.merging.verify.folder import verify
from personalized_soups.merging.verify.model import magnitude_of
from personalized_soups.merging.writing.many import merge_many
from tests import oracles
from tests.experts import SHAPES, write_expert
from tests.merging.verify.tampering import (
    PROFILE,
    Q_PROJ,
    WEIGHTS_FILE,
    change_bits,
    check_sound,
    flipped,
    library_in,
    nudged,
)
from tests.merging.writing.test_into_base import write_base


@pytest.fixture
def library(tmp_path: Path) -> ExpertLibrary:
    return library_in(tmp_path / "experts")


SOUND: Mapping[str, Mapping[str, Any]] = {
    "stacked": {},
    "truncated": {"rank": 3},
    "energy": {"energy": 0.9},
    "vllm": {"energy": 0.9, "target": "vllm"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16 truncated": {"rank": 3, "dtype": "float16"},
    "knots": {"method": "knots"},
    "random": {"method": "dare_ties", "method_options": {"seed": 3, "density": 0.3}, "rank": 5},
    "dense with an energy share": {"method": "ties@paper", "energy": 0.8},
}


@pytest.mark.parametrize("options", SOUND.values(), ids=SOUND.keys())
def test_an_adapter_as_it_was_written_is_identical(
    tmp_path: Path, library: ExpertLibrary, options: Mapping[str, Any]
) -> None:
    out = merge(library, PROFILE, MergeOptions(**options)).write(tmp_path / "out")
    verification = verify(out)
    check_sound(verification)
    assert (verification.kind, verification.num_tensors, verification.differences) == ("adapter", 2 * len(SHAPES), ())
    assert verification.as_json()["sound"] is True


@pytest.mark.parametrize("method", ["factor_average", "factor_linear", "factor_ties", "factor_dare_linear"])
def test_factor_methods_are_identical_and_one_ulp_off_is_rounding(tmp_path: Path, method: str) -> None:
    library = library_in(tmp_path / "experts", ranks=(4, 4, 4))
    out = merge(library, PROFILE, MergeOptions(method=method)).write(tmp_path / "out")
    check_sound(verify(out))
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("A"), nudged)
    verification = verify(out)
    check_sound(verification, "equal to rounding")
    assert [difference.name for difference in verification.differences] == [Q_PROJ.format("A")]


def test_a_profile_with_a_rank_an_expert_of_weight_0_and_a_sum_is_recomputed(
    tmp_path: Path, library: ExpertLibrary
) -> None:
    profile = Profile(weights={"two": 2.0, "three": 0.0, "one": 1.0}, normalize="sum", rank=3)
    check_sound(verify(merge(library, profile).write(tmp_path / "own")))
    # an option overrides the profile's rank by one above the soup's, so nothing is truncated
    check_sound(verify(merge(library, profile, MergeOptions(rank=100)).write(tmp_path / "overridden")))


@pytest.mark.parametrize("options", [{}, {"method": "dare_linear", "rank": 4}, {"rank": 3}, {"energy": 0.9}])
@pytest.mark.parametrize("a_seed", [None, 7])
def test_folders_that_merge_many_writes_are_sound(
    tmp_path: Path, options: Mapping[str, Any], a_seed: int | None
) -> None:
    library = library_in(tmp_path / "experts", ranks=(4, 4, 4), a_seed=a_seed)
    weights = {"first": dict(PROFILE.weights), "second": {"three": 0.2, "one": 0.9, "two": -0.1}}
    profiles = [Profile(user=user, weights=own) for user, own in weights.items()]
    merge_many(library, profiles, tmp_path / "out", MergeOptions(**options))
    for user in weights:
        verification = verify(tmp_path / "out" / user)
        assert verification.is_sound, verification
        # a float32 product computes the sums of several users over one basis
        assert verification.verdict == "identical" or (a_seed is not None and not options), verification


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("options", [{}, {"method": "della", "method_options": {"seed": 1}}, {"method": "knots"}])
def test_a_model_as_it_was_written_is_identical(
    tmp_path: Path, library: ExpertLibrary, dtype: str, options: Mapping[str, Any]
) -> None:
    out = merge_into_base(
        library, PROFILE, write_base(tmp_path / "base", dtype), tmp_path / "out", MergeOptions(**options)
    )
    steps: list[tuple[int, int]] = []
    verification = verify(out, progress=lambda done, total: steps.append((done, total)))
    check_sound(verification)
    assert (verification.kind, verification.num_tensors) == ("model", 1 + 2 * len(SHAPES))
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"rank": 3, "dtype": "bfloat16"}, {"dtype": "float16"}])
def test_one_ulp_in_every_element_of_b_is_rounding(
    tmp_path: Path, library: ExpertLibrary, options: Mapping[str, Any]
) -> None:
    out = merge(library, PROFILE, MergeOptions(**options)).write(tmp_path / "out")
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("B"), nudged)
    verification = verify(out)
    check_sound(verification, "equal to rounding")
    assert (verification.num_rounded, verification.num_different) == (1, 0)
    # an ulp is between eps / 2 and eps of the value
    eps = 2 * oracles.HALF_ULP[{"bfloat16": "BF16", "float16": "F16"}.get(str(options.get("dtype")), "F32")]
    assert verification.differences[0].relative is not None
    assert eps / 8 < verification.differences[0].relative < eps


def test_sixteen_ulps_and_one_bit_in_an_a_of_a_stack_are_differences(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    kept = (out / WEIGHTS_FILE).read_bytes()
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("B"), lambda bits: bits + 16)
    assert verify(out).verdict == "different"
    (out / WEIGHTS_FILE).write_bytes(kept)
    change_bits(out / WEIGHTS_FILE, Q_PROJ.format("A"), flipped(0))
    verification = verify(out)
    assert (verification.verdict, verification.num_different, verification.is_sound) == ("different", 1, False)


def test_factors_rotated_together_are_the_same_delta(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE, MergeOptions(rank=3)).write(tmp_path / "out")
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
    out = merge_into_base(library, PROFILE, base, tmp_path / "out", MergeOptions(**options))
    name = "model.layers.1.mlp.up_proj.weight"
    change_bits(out / "model.safetensors", name, nudged)
    verification = verify(out)
    check_sound(verification, "equal to rounding")
    assert [difference.name for difference in verification.differences] == [name]
    # The bound is (eps + 2 * 11 * 2^-24) times a sum of magnitudes: at most 12 * 2^-23 times the sum in float32. An ulp
    # is at least eps / 2 of the value. Where nothing cancels, the sum is close to the value, so the steps below are at
    # least twice the bound.
    change_bits(out / "model.safetensors", name, lambda bits: bits + (64 if dtype == "F32" else 8))
    verification = verify(out)
    assert (verification.verdict, verification.num_different) == ("different", 1)


def test_a_tensor_that_the_soup_does_not_change_must_be_equal(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    before = oracles.read_tensors(out / "model.safetensors")
    change_bits(out / "model.safetensors", "model.embed_tokens.weight", flipped(0))
    after = oracles.read_tensors(out / "model.safetensors")
    (different,) = verify(out).differences
    apart = after["model.embed_tokens.weight"] - before["model.embed_tokens.weight"]
    assert (different.name, different.is_rounding) == ("model.embed_tokens.weight", False)
    assert different.largest == np.abs(apart).max()


@pytest.mark.parametrize("options", [{}, {"rank": 3}, {"energy": 0.9}])
def test_one_flipped_bit_is_a_difference_of_its_size(
    tmp_path: Path, library: ExpertLibrary, options: Mapping[str, Any]
) -> None:
    out = merge(library, PROFILE, MergeOptions(**options)).write(tmp_path / "out")
    before, deltas = oracles.read_tensors(out / WEIGHTS_FILE), oracles.deltas(out)
    name = Q_PROJ.format("B")
    change_bits(out / WEIGHTS_FILE, name, flipped(23))  # the exponent's lowest bit: twice or half the value
    after, changed = oracles.read_tensors(out / WEIGHTS_FILE), oracles.deltas(out)
    verification = verify(out)
    assert (verification.verdict, verification.num_rounded, verification.num_different) == ("different", 0, 1)
    (different,) = verification.differences
    assert different.largest == pytest.approx(np.abs(after[name] - before[name]).max(), rel=1e-12)
    module = "model.layers.0.self_attn.q_proj"
    # a stack is compared factor by factor, a truncated soup by its products
    want = (
        oracles.relative_error(changed[module], deltas[module])
        if options
        else oracles.relative_error(after[name], before[name])
    )
    assert different.relative == pytest.approx(want, rel=1e-6)


def test_nan_is_a_difference_and_fits_into_json(tmp_path: Path, library: ExpertLibrary) -> None:
    for number, options in enumerate(({}, {"rank": 3})):
        out = merge(library, PROFILE, MergeOptions(**options)).write(tmp_path / f"adapter{number}")  # type: ignore[arg-type]
        change_bits(out / WEIGHTS_FILE, Q_PROJ.format("B"), lambda bits: bits | 0x7FC00000)
        verification = verify(out)
        assert verification.verdict == "different"
        assert [(difference.largest, difference.relative) for difference in verification.differences] == [(None, None)]
        json.dumps(verification.as_json(), allow_nan=False)
    out = merge_into_base(library, PROFILE, write_base(tmp_path / "base", shards=1), tmp_path / "out")
    change_bits(out / "model.safetensors", "model.layers.0.mlp.up_proj.weight", lambda bits: bits | 0x7FC00000)
    assert [difference.largest for difference in verify(out).differences] == [None]


def test_at_most_eight_differences_are_kept_and_the_largest_first(tmp_path: Path, library: ExpertLibrary) -> None:
    out = merge(library, PROFILE).write(tmp_path / "out")
    tensors = oracles.read_tensors(out / WEIGHTS_FILE)
    for number, name in enumerate(tensors):
        tensors[name] = tensors[name] * (1 + 2.0 ** -(number + 1))
    oracles.write_tensors(out / WEIGHTS_FILE, {k: ("F32", v) for k, v in tensors.items()}, {"format": "pt"})
    verification = verify(out)
    assert verification.num_different == 2 * len(SHAPES)
    assert [difference.relative for difference in verification.differences] == pytest.approx(
        [2.0 ** -(number + 1) for number in range(8)], rel=1e-3
    )


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
