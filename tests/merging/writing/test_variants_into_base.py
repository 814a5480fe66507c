"""Every variant folded into its base, compared with PEFT's merge of each single expert."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from personalized_soups import MergeOptions, Profile, merge_into_base
from personalized_soups.bank.expert_bank import ExpertBank
from personalized_soups.errors import IncompatibleExpertsError, InputError, UnsupportedAdapterError
from personalized_soups.merging.computing import blocks, dora
from personalized_soups.merging.computing.module_soups import Soups
from personalized_soups.merging.planning.planner import plan_merge
from tests.adapters.test_against_peft import CASES, llama
from tests.merging.variants import MIXTURES, World, make_world, named_weights, read

pytest.importorskip("peft")


def check(got: Tensor, want: Tensor, room: Tensor, name: str) -> None:
    """Check `|got - want|`: half an ulp of the dtype, and the float32 roundings on the way.

    PEFT rounds each W'_e a few times to float32, and so do we each of at most a dozen terms: 32 roundings of what the
    terms are together, in the norm of the tensor.
    """
    accumulated = 32 * 2.0**-24 * float(torch.linalg.norm(room))
    rounded = torch.finfo(got.dtype).eps / 2 * float(torch.linalg.norm(want)) if got.dtype != torch.float32 else 0.0
    assert float(torch.linalg.norm(got.double() - want)) <= accumulated + rounded, name


def check_folded(world: World, weights: dict[str, float], out: Path, **options: Any) -> None:
    merge_into_base(world.library, Profile(weights=weights), world.base, out, MergeOptions(**options))
    got, before, changed = read(out), read(world.base), 0
    assert got.keys() == before.keys()
    for name, want in world.soup(weights).items():
        if name not in got:
            continue
        if torch.equal(want, world.tensors[name].to(want.dtype)):
            assert torch.equal(got[name], before[name]), name
            continue
        changed += 1
        steps = [abs(weight) * world.experts[each].merged[name].double().abs() for each, weight in weights.items()]
        room = torch.stack([world.tensors[name].double().abs(), *steps]).sum(dim=0)
        check(got[name], want, room, name)
    assert changed


@pytest.mark.parametrize("name", CASES)
def test_one_expert_of_weight_1_is_what_peft_merges(tmp_path: Path, name: str) -> None:
    make, config = CASES[name]
    left_out = ["lm_head.weight"] if name == "saved and tied" else []
    check_folded(make_world(tmp_path, make, [config], left_out=left_out), {"e0": 1.0}, tmp_path / "out")


@pytest.mark.parametrize("name", MIXTURES)
def test_mixtures_are_the_dense_formula(tmp_path: Path, name: str) -> None:
    make, configs = MIXTURES[name]
    check_folded(make_world(tmp_path, make, configs), named_weights(len(configs)), tmp_path / "out")


@pytest.mark.parametrize("name", ["conv1d", "dora and plain", "saved and adapted", "tokens", "transposed experts"])
def test_bases_are_folded_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(dora, "_BLOCK", 100)
    monkeypatch.setitem(blocks._BLOCK, "cpu", 100)
    test_mixtures_are_the_dense_formula(tmp_path, name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["dora and plain", "saved and adapted", "experts of a mixture"])
def test_bases_of_16_bits_are_rounded_once(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    make, configs = MIXTURES[name]
    check_folded(make_world(tmp_path, make, configs, dtype=dtype), named_weights(len(configs)), tmp_path / "out")


def test_tied_embeddings_that_change_alike_stay_tied(tmp_path: Path) -> None:
    configs: Sequence[dict[str, Any]] = [
        {"target_modules": ["q_proj"], "use_dora": True},
        {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    ]
    world = make_world(tmp_path, lambda: llama(tied=True), configs, left_out=["lm_head.weight"])
    # PEFT's merge adds the last one's change to the one tensor twice: once for each of the two layers (tying.py)
    twice, base = world.experts["e3"], world.tensors
    once = {name: (tensor + base[name]) / 2 for name, tensor in twice.merged.items()}
    world = replace(world, experts={**world.experts, "e3": replace(twice, merged=once)})
    check_folded(world, named_weights(4), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").read_bytes() == (world.base / "config.json").read_bytes()


def test_a_bare_models_checkpoint_is_found_under_its_shorter_names(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make, configs = MIXTURES["conv1d"]
    world = make_world(tmp_path, make, configs, left_out=["lm_head.weight"])
    path = world.base / "model.safetensors"
    save_file({name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}, path)
    weights = named_weights(len(configs))
    merge_into_base(world.library, Profile(weights=weights), world.base, tmp_path / "out")
    got = {f"transformer.{name}": tensor for name, tensor in read(tmp_path / "out").items()}
    for name, want in world.soup(weights).items():
        if name in got:
            torch.testing.assert_close(got[name].double(), want, rtol=0, atol=1e-5)


def test_dora_over_an_output_of_zeros_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.0.self_attn.q_proj"
    world = make_world(tmp_path, llama, [{"target_modules": ["q_proj"], "use_dora": True}])
    for path, tensor in (
        (world.base / "model.safetensors", f"{name}.weight"),
        (world.experts["e0"].folder / "adapter_model.safetensors", f"base_model.model.{name}.lora_B.weight"),
    ):
        tensors = load_file(path)
        tensors[tensor][3] = 0
        save_file(tensors, path)
    with pytest.raises(InputError, match=r"all weights of output 3 are 0 in the sum of the base and"):
        merge_into_base(world.library, Profile(weights={"e0": 1.0}), world.base, tmp_path / "out")


def test_dora_on_a_saved_embedding_that_is_not_the_bases_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    world = make_world(tmp_path, llama, [{"target_modules": ["embed_tokens"], "use_dora": True}])
    path = world.experts["e0"].folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.model.embed_tokens.base_layer.weight"][0, 0] += 1
    save_file(tensors, path)
    with pytest.raises(UnsupportedAdapterError, match="DoRA magnitudes belong to the saved tensor"):
        merge_into_base(world.library, Profile(weights={"e0": 1.0}), world.base, tmp_path / "out")


def test_what_is_trained_for_other_shapes_is_told_at_once(tmp_path: Path) -> None:
    world = make_world(
        tmp_path / "a", llama, [{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}],
        left_out=["lm_head.weight"],
    )  # fmt: skip
    config = json.loads((world.base / "config.json").read_text())
    (world.base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    with pytest.raises(IncompatibleExpertsError, match=r"lm_head\.weight is not in the base"):
        merge_into_base(world.library, Profile(weights={"e0": 1.0}), world.base, tmp_path / "out")


@pytest.mark.parametrize("method", ["ties", "factor_average"])
def test_methods_without_a_rule_for_whole_tensors_are_refused(tmp_path: Path, method: str) -> None:
    world = make_world(tmp_path, llama, [{"target_modules": ["q_proj"], "use_dora": True}])
    with pytest.raises(UnsupportedAdapterError, match=rf"whole \(use_dora\), but the method {method} merges only"):
        merge_into_base(world.library, Profile(weights={"e0": 1.0}, method=method), world.base, tmp_path / "out")


def test_a_model_wide_threshold_counts_each_expert_of_a_mixture(tmp_path: Path) -> None:
    """ties@paper trims over all deltas of an expert; each block of a mixture is a separate delta."""
    world = make_world(tmp_path, *MIXTURES["experts of a mixture"])
    plan = plan_merge(
        world.library,
        Profile(weights={"e0": 1.0}),
        MergeOptions(method="ties@paper", method_options={"density": 0.2}),
        into_base=True,
    )
    soups = Soups([plan], ExpertBank([world.library["e0"]]))
    changed = [world.experts["e0"].merged[name].double() - base.double() for name, base in world.tensors.items()]
    entries = torch.cat([each.abs().flatten() for each in changed if bool(each.any())])
    want = entries.topk(int(0.2 * entries.numel())).values[-1].item()
    # PEFT's merge is float32: the differences owe 2^-24 of the base's values of a few times the deltas'
    assert soups.method.thresholds[0] == pytest.approx(want, rel=1e-4)
