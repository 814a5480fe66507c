"""Every variant as an adapter: PEFT's merge of the adapter into the base equals the dense formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from personalized_soups import MergeOptions, Profile, merge
from personalized_soups.adapters.fingerprint import base_fingerprint
from personalized_soups.adapters.lora import LoraAdapter
from personalized_soups.adapters.provenance import read_soup_record
from personalized_soups.errors import IncompatibleExpertsError, UsageError
from personalized_soups.merging.computing import blocks, dora
from personalized_soups.merging.verify.folder import verify
from personalized_soups.merging.writing.many import merge_many
from tests import oracles
from tests.adapters.test_against_peft import CASES, EXPERTS, llama, mixtral
from tests.experts import write_record
from tests.merging.variants import MIXTURES, World, make_world, named_weights

peft = pytest.importorskip("peft")

# Experts of the mixtures that PEFT can hold in one adapter.
AS_ADAPTERS = [
    *((name, "0 1") for name in MIXTURES if name not in {"saved and adapted", "biases"}),
    ("two doras", "0"),
    ("saved and adapted", "0 2"),
    ("biases", "0 1 2"),
    ("embeddings", "2"),
    ("conv1d", "0 2"),
    ("convolutions", "0 2"),
    ("experts of a mixture", "0 1 2"),
    # each has one parameter, and the same names for it
    ("experts of a mixture", "1 2"),
]


def loaded(make: Callable[[], nn.Module], world: World, folder: Path) -> dict[str, Tensor]:
    """Return the tensors of the base after PEFT loaded an adapter and merged it."""
    model = make()
    model.load_state_dict(world.tensors)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        wrapped: Any = peft.PeftModel.from_pretrained(model, folder)
        merged: dict[str, Tensor] = wrapped.merge_and_unload().state_dict()
    assert not [warning for warning in caught if "missing" in str(warning.message).lower()]
    return merged


def check_adapter(
    make: Callable[[], nn.Module],
    world: World,
    weights: dict[str, float],
    out: Path,
    *,
    room: float = 1.0,
    **options: Any,
) -> None:
    folder = merge(world.library, Profile(weights=weights), MergeOptions(base=world.base, **options)).write(out)
    LoraAdapter.open(folder)  # we take it for an expert ourselves
    got, changed = loaded(make, world, folder), 0
    assert got.keys() == world.tensors.keys()
    for name, want in world.soup(weights).items():
        steps = [abs(weight) * world.experts[each].merged[name].double().abs() for each, weight in weights.items()]
        size = torch.stack([world.tensors[name].double().abs(), *steps]).sum(dim=0)
        # PEFT rounds each W'_e and the merged one a few times to float32, and so do we the terms and the factors
        bound = room * 64 * 2.0**-24 * float(torch.linalg.norm(size))
        assert float(torch.linalg.norm(got[name].double() - want)) <= bound, name
        changed += not torch.equal(want, world.tensors[name].to(want.dtype))
    assert changed


@pytest.mark.parametrize("name", CASES)
def test_one_expert_of_weight_1_is_that_expert(tmp_path: Path, name: str) -> None:
    make, config = CASES[name]
    check_adapter(make, make_world(tmp_path, make, [config]), {"e0": 1.0}, tmp_path / "out")


@pytest.mark.parametrize(("name", "experts"), AS_ADAPTERS)
def test_mixtures_are_the_dense_formula(tmp_path: Path, name: str, experts: str) -> None:
    make, configs = MIXTURES[name]
    weights = {each: weight for each, weight in named_weights(len(configs)).items() if each[1:] in experts}
    check_adapter(make, make_world(tmp_path, make, configs), weights, tmp_path / "out")


@pytest.mark.parametrize("experts", ["0 1", "2 3"])
def test_on_tied_embeddings(tmp_path: Path, experts: str) -> None:
    configs: list[dict[str, Any]] = [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ]
    world = make_world(tmp_path, lambda: llama(tied=True), configs, left_out=["lm_head.weight"])
    weights = {each: weight for each, weight in named_weights(4).items() if each[1:] in experts}
    check_adapter(lambda: llama(tied=True), world, weights, tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "experts"), [("conv1d", "0 1"), ("dora and plain", "0 1"), ("saved and adapted", "0 2")]
)
def test_bases_are_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, experts: str) -> None:
    monkeypatch.setattr(dora, "_BLOCK", 100)
    monkeypatch.setitem(blocks._BLOCK, "cpu", 100)
    test_mixtures_are_the_dense_formula(tmp_path, name, experts)


def test_modules_and_parameters_are_targeted_apart(tmp_path: Path) -> None:
    config = {"target_modules": ["q_proj", "k_proj"], "exclude_modules": ["k_proj"], "target_parameters": EXPERTS}
    world = make_world(tmp_path, mixtral, [config])
    layout = merge(world.library, Profile(weights={"e0": 1.0})).plan.layout
    assert layout.target_modules == ("model.layers.0.self_attn.q_proj",)
    assert layout.target_parameters == tuple(f"model.layers.0.{name}" for name in sorted(EXPERTS))
    check_adapter(mixtral, world, {"e0": 1.0}, tmp_path / "out")


def test_a_base_of_16_bits_is_read_as_it_is(tmp_path: Path) -> None:
    make, configs = MIXTURES["dora and plain"]
    world = make_world(tmp_path, make, configs, dtype=torch.bfloat16)
    check_adapter(make, world, named_weights(2), tmp_path / "out")


def test_adapters_of_16_bits_are_rounded_once(tmp_path: Path) -> None:
    make, configs = MIXTURES["dora and plain"]
    world = make_world(tmp_path, make, configs)
    # A, B and m are rounded to 8 bits each: 3 * 2^-9 of what their products are together
    check_adapter(make, world, named_weights(2), tmp_path / "out", room=3 * 2.0**-9 / (64 * 2.0**-24), dtype="bfloat16")


@pytest.mark.parametrize("cut", [{"rank": 8}, {"energy": 1.0}])
def test_dora_cut_at_its_full_rank_is_dora(tmp_path: Path, cut: dict[str, Any]) -> None:
    make, configs = MIXTURES["dora and plain"]
    check_adapter(make, make_world(tmp_path, make, configs), named_weights(2), tmp_path / "out", **cut)


def test_dora_is_truncated_where_it_is_optimal_and_says_its_error(tmp_path: Path) -> None:
    """`W' = d W + G`: the best rank-k G, for any d; its error is that of W', relative to G."""
    name = "model.layers.0.self_attn.q_proj"
    config = {"target_modules": ["q_proj"], "use_dora": True}
    world, weights = make_world(tmp_path, llama, [config, config]), named_weights(2)
    folder = merge(world.library, Profile(weights=weights), MergeOptions(base=world.base, rank=3)).write(
        tmp_path / "out"
    )
    base = world.tensors[f"{name}.weight"].double().numpy()
    share, low = 1.0 + np.zeros(len(base)), np.zeros_like(base)
    for expert, weight in weights.items():
        tensors = oracles.read_tensors(world.experts[expert].folder / "adapter_model.safetensors")
        a, b, m = (
            tensors[f"base_model.model.{name}.lora_{each}"] for each in ("A.weight", "B.weight", "magnitude_vector")
        )
        gain = m / np.linalg.norm(base + 1.5 * b @ a, axis=1)
        share += weight * (gain - 1)
        low += weight * gain[:, None] * (1.5 * b @ a)
    u, s, v = np.linalg.svd(low)
    want = share[:, None] * base + (u[:, :3] * s[:3]) @ v[:3]
    got = loaded(llama, world, folder)[f"{name}.weight"].double().numpy()
    assert np.linalg.norm(got - want) <= 1e-5 * np.linalg.norm(want)
    record = read_soup_record(folder)
    assert record is not None
    assert record.truncation is not None
    assert record.truncation.total == pytest.approx(np.linalg.norm(s[3:]) / np.linalg.norm(s), rel=1e-4)


def test_the_record_says_which_base_was_read(tmp_path: Path) -> None:
    make, configs = MIXTURES["dora and plain"]
    world = make_world(tmp_path, make, configs)
    library, profile = world.library, Profile(weights={"e0": 0.5})
    record = read_soup_record(merge(library, profile, MergeOptions(base=world.base)).write(tmp_path / "out"))
    assert record is not None
    assert record.base_folder == str(world.base)
    assert record.base.fingerprint == base_fingerprint(world.base)
    plain = read_soup_record(merge(library, Profile(weights={"e1": 0.5})).write(tmp_path / "plain"))
    assert plain is not None
    assert plain.base_folder is None


def test_tensors_are_those_of_the_file(tmp_path: Path) -> None:
    make, configs = MIXTURES["conv1d"]
    world = make_world(tmp_path, make, configs)
    merged = merge(world.library, Profile(weights={"e0": 0.5, "e2": 0.7}), MergeOptions(base=world.base))
    written = load_file(merged.write(tmp_path / "out") / "adapter_model.safetensors")
    assert written.keys() == merged.tensors.keys()
    assert any(name.endswith(".base_layer.bias") for name in written)
    for name, tensor in merged.tensors.items():
        assert torch.equal(tensor, written[name]), name


def test_lora_bias_needs_no_base(tmp_path: Path) -> None:
    world = make_world(tmp_path, lambda: llama(biased=True), [
        {"target_modules": ["q_proj"], "lora_bias": True, "lora_alpha": 8}, {"target_modules": ["v_proj"]},
    ])  # fmt: skip
    folder = merge(world.library, Profile(weights={"e0": -0.5, "e1": 1.0})).write(tmp_path / "out")
    prefix = "base_model.model.model.layers.0.self_attn"
    own = load_file(world.experts["e0"].folder / "adapter_model.safetensors")[f"{prefix}.q_proj.lora_B.bias"]
    written = load_file(folder / "adapter_model.safetensors")
    torch.testing.assert_close(written[f"{prefix}.q_proj.lora_B.bias"], -0.5 * 2 * own)
    assert not written[f"{prefix}.v_proj.lora_B.bias"].any()


def test_embeddings_that_were_saved_unchanged_are_not_written(tmp_path: Path) -> None:
    make, configs = MIXTURES["embeddings"]
    world = make_world(tmp_path, make, configs)
    folder = merge(world.library, Profile(weights={"e0": 0.5}), MergeOptions(base=world.base)).write(tmp_path / "out")
    names = load_file(folder / "adapter_model.safetensors").keys()
    assert len(names) == 4
    assert all("lora_" in name for name in names)


NEEDS: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"lora_magnitude_vector \(use_dora\) is relative to the base, but no base is given"),
    "bias": ({"bias": "all"}, r"bias \(bias\) replaces values of the base, but no base is given"),
    "saved": ({"modules_to_save": ["lm_head"]}, r"lm_head\.weight \(modules_to_save\) replaces values of the base"),
    "tokens": ({"trainable_token_indices": [3]}, r"tokens_delta \(trainable_token_indices\) replaces values of the"),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_is_relative_to_the_base_needs_it(tmp_path: Path, name: str) -> None:
    config, message = NEEDS[name]
    world = make_world(tmp_path, lambda: llama(biased=True), [{"target_modules": ["q_proj"], **config}])
    with pytest.raises(UsageError, match=f"e0: .*{message}") as caught:
        merge(world.library, Profile(weights={"e0": 1.0}))
    assert "base=BASE" in caught.value.mend
    assert "into_base=BASE" in caught.value.mend


@pytest.mark.parametrize("name", [*NEEDS, "lora_bias"])
def test_what_vllm_does_not_take_is_refused_by_name(tmp_path: Path, name: str) -> None:
    config = NEEDS[name][0] if name in NEEDS else {"lora_bias": True}
    world = make_world(tmp_path, lambda: llama(biased=True), [{"target_modules": ["q_proj"], **config}])
    with pytest.raises(UsageError, match=r"e0: vLLM does not support base_model\.model\..*\("):
        merge(world.library, Profile(weights={"e0": 1.0}), MergeOptions(base=world.base, target="vllm"))


@pytest.mark.parametrize("name", ["convolutions", "experts of a mixture"])
def test_layers_that_vllm_has_no_lora_for_are_refused_by_name(tmp_path: Path, name: str) -> None:
    make, configs = MIXTURES[name]
    world = make_world(tmp_path, make, configs[:1])
    with pytest.raises(UsageError, match=r"e0: vLLM does not support .* \(a (convolution|parameter)\)"):
        merge(world.library, Profile(weights={"e0": 1.0}), MergeOptions(base=world.base, target="vllm"))


CONFLICTS: dict[str, tuple[str, str, str]] = {
    "saved and adapted": ("saved and adapted", "e0 e1", "one expert adapts lm_head, but another saves it whole"),
    "rows and adapted": ("tokens", "e0 e2", "one expert adapts .*embed_tokens, but another trains some of its rows"),
    "dora and lora_bias": ("convolutions", "e1 e2", "one expert has DoRA magnitudes, but another has biases of B"),
}


@pytest.mark.parametrize("name", CONFLICTS)
def test_what_peft_cannot_hold_together_is_refused_by_name(tmp_path: Path, name: str) -> None:
    mixture, experts, message = CONFLICTS[name]
    make, configs = MIXTURES[mixture]
    world = make_world(tmp_path, make, configs)
    with pytest.raises(UsageError, match=message) as caught:
        merge(world.library, Profile(weights=dict.fromkeys(experts.split(), 0.5)), MergeOptions(base=world.base))
    assert "into_base=BASE" in caught.value.mend


def test_parameters_take_no_dora(tmp_path: Path) -> None:
    make, configs = MIXTURES["experts of a mixture"]
    world = make_world(tmp_path, make, [configs[0], {"target_modules": ["q_proj"], "use_dora": True}])
    with pytest.raises(UsageError, match="a parameter cannot have a DoRA magnitude"):
        merge(world.library, Profile(weights={"e0": 0.5, "e1": 0.5}), MergeOptions(base=world.base))


def test_a_share_of_the_base_of_0_is_refused(tmp_path: Path) -> None:
    """For one expert with D = 0.5 everywhere and weight 2, d = 1 + 2 (0.5 - 1) = 0."""
    world = make_world(tmp_path, llama, [{"target_modules": ["q_proj"], "use_dora": True}])
    name = "model.layers.0.self_attn.q_proj"
    path = world.experts["e0"].folder / "adapter_model.safetensors"
    tensors = load_file(path)
    a, b = (tensors[f"base_model.model.{name}.lora_{each}.weight"].double() for each in "AB")
    norms = torch.linalg.norm(world.tensors[f"{name}.weight"].double() + 1.5 * b @ a, dim=1)
    tensors[f"base_model.model.{name}.lora_magnitude_vector"] = (norms / 2).float()
    save_file(tensors, path)
    with pytest.raises(UsageError, match=r"q_proj: the soup multiplies output \d+ of the base by"):
        merge(world.library, Profile(weights={"e0": 2.0}), MergeOptions(base=world.base)).write(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    world = make_world(tmp_path / "a", llama, [{"target_modules": ["q_proj"], "use_dora": True}])
    write_record(world.experts["e0"].folder, base={"name": "x", "fingerprint": "0" * 64})
    with pytest.raises(IncompatibleExpertsError, match="trained on another base than the given one"):
        merge(world.library, Profile(weights={"e0": 1.0}), MergeOptions(base=world.base))
    merge(world.library, Profile(weights={"e0": 1.0}), MergeOptions(base=world.base, same_base=True))
    # a base of other shapes is rejected, even if its fingerprint is not compared
    tensors = load_file(world.base / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 4)
    save_file(tensors, world.base / "model.safetensors")
    merged = merge(world.library, Profile(weights={"e0": 1.0}), MergeOptions(base=world.base, same_base=True))
    with pytest.raises(IncompatibleExpertsError, match=r"q_proj\.weight: the base has shape \[3, 4\]"):
        merged.write(tmp_path / "out")


VERIFIED = [("dora and plain", {}), ("dora and plain", {"rank": 3}), ("saved and adapted", {}), ("biases", {})]


@pytest.mark.parametrize(("name", "options"), VERIFIED)
def test_verify_recomputes_them_and_sees_every_tensor(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    make, configs = MIXTURES[name]
    world = make_world(tmp_path, make, configs)
    weights = {"e0": 0.7, "e2": 1.1} if name == "saved and adapted" else named_weights(len(configs))
    folder = merge(world.library, Profile(weights=weights), MergeOptions(base=world.base, **options)).write(
        tmp_path / "out"
    )
    assert verify(folder).is_sound
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    for changed in tensors:
        damaged = {each: tensor.clone() for each, tensor in tensors.items()}
        damaged[changed].view(-1)[-1] += 0.1
        save_file(damaged, path, {"format": "pt"})
        found = verify(folder)
        assert not found.is_sound
        assert changed in str(found.as_json())


def test_many_users_have_lora_bias_and_are_told_what_needs_a_base(tmp_path: Path) -> None:
    lora_bias = {"target_modules": ["q_proj"], "lora_bias": True}
    world = make_world(tmp_path / "a", lambda: llama(biased=True), [lora_bias, lora_bias, {**lora_bias, "bias": "all"}])
    profiles = [Profile(user=f"u{number}", weights={"e0": 0.5, "e1": number - 0.5}) for number in range(3)]
    assert merge_many(world.library, profiles, tmp_path / "many").written == 3
    for profile in profiles:
        alone = load_file(merge(world.library, profile).write(tmp_path / profile.user) / "adapter_model.safetensors")
        assert any(name.endswith("lora_B.bias") for name in alone)
        for name, tensor in load_file(tmp_path / "many" / profile.user / "adapter_model.safetensors").items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-6, atol=1e-7)
    with pytest.raises(UsageError, match="no base is given"):
        merge_many(world.library, [Profile(user="u", weights={"e2": 1.0})], tmp_path / "many")
