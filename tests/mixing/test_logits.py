"""Every row's logits are those of its merged model alone, in float64; leaving gives back the bare base to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from personalized_soups import ExpertLibrary, Profile, SoupModel
from tests.experts import SHAPES, write_expert
from tests.mixing.worlds import (
    LOGITS,
    float64_model,
    open_model,
    random_ids,
    relative,
    true_logits,
    write_experts,
    write_shared,
)

ROWS: list[dict[str, float] | None] = [
    {"cold": 0.6, "warm": 0.5},
    None,
    {"plain": 1.3},
    {"cold": -0.7, "plain": 0.4, "warm": 1.1},
]


@pytest.mark.parametrize("write", [write_experts, write_shared])
def test_rows_of_a_batch_have_their_own_merged_models_logits(tmp_path: Path, small_base: Path, write: Any) -> None:
    folders = write(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    ids_BT = random_ids(len(ROWS), 9)
    with model.mixture(ROWS), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, weights in enumerate(ROWS):
        want = true_logits(small_base, folders, weights, ids_BT[row])
        assert relative(got[row], want) < LOGITS, weights
        if weights:  # the soup moves the logits by far more than what is owed
            assert relative(got[row], true_logits(small_base, folders, None, ids_BT[row])) > 1e-2


def test_experts_with_one_a_are_computed_with_one_a(tmp_path: Path, small_base: Path) -> None:
    write_shared(tmp_path / "experts")
    stacks = [layer.stack for layer in open_model(small_base, tmp_path / "experts").layers.by_name.values()]
    assert len(stacks) == len(SHAPES)
    for stack in stacks:
        assert stack.a_CI.shape[0] == 4
        assert stack.b_KO.shape[0] == 12


def test_outside_of_a_mixture_the_model_is_the_base_to_the_bit(tmp_path: Path, small_base: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_experts(tmp_path / "experts")
    ids_BT = random_ids(4, 9)
    bare = AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.float32).eval()
    model = open_model(small_base, tmp_path / "experts")
    with torch.no_grad():
        want = bare(input_ids=ids_BT).logits
        assert torch.equal(model(input_ids=ids_BT).logits, want)
        with model.mixture(ROWS):
            assert not torch.equal(model(input_ids=ids_BT).logits, want)
        assert torch.equal(model(input_ids=ids_BT).logits, want)
        with model.mixture([None] * 4):
            assert torch.equal(model(input_ids=ids_BT).logits, want)
    unloaded = model.unload()
    assert [type(layer).__name__ for layer in unloaded.modules()] == [type(layer).__name__ for layer in bare.modules()]
    with torch.no_grad():
        assert torch.equal(unloaded(input_ids=ids_BT).logits, want)


def test_an_inner_mixture_gives_way_to_the_outer_one(tmp_path: Path, small_base: Path) -> None:
    write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    ids_BT = random_ids(2, 5)
    with torch.no_grad(), model.mixture([{"cold": 1.0}, {"warm": 1.0}]):
        outer = model(input_ids=ids_BT).logits
        with model.mixture([{"warm": 1.0}, {"cold": 1.0}]):
            inner = model(input_ids=ids_BT).logits
        assert torch.equal(model(input_ids=ids_BT).logits, outer)
    assert not torch.equal(inner, outer)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_sixteen_bit_models_err_as_much_as_the_base_does(tmp_path: Path, small_base: Path, dtype: str) -> None:
    # Rounding all weights and activations to u = eps / 2 moves the bare base's logits by a multiple of u. A layer
    # rounds its inputs and its output; the soup also rounds A x, the gated A x and the sum. So the error may be
    # (2 + 3) / 2 times the error of the bare base, which is measured here, too.
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", dtype=dtype)
    ids_BT = random_ids(len(ROWS), 9)
    with torch.no_grad():
        bare = model(input_ids=ids_BT).logits
        with model.mixture(ROWS):
            got = model(input_ids=ids_BT).logits
    assert got.dtype == getattr(torch, dtype)
    own = max(relative(bare[row], true_logits(small_base, folders, None, ids_BT[row])) for row in range(len(ROWS)))
    assert own < 64 * torch.finfo(got.dtype).eps
    for row, weights in enumerate(ROWS):
        assert relative(got[row], true_logits(small_base, folders, weights, ids_BT[row])) < 2.5 * own


def test_packed_sequences_have_a_gate_per_token(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts", attn_implementation="sdpa")
    lengths = (4, 6, 3)
    parts = [random_ids(1, length, seed=length)[0] for length in lengths]
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    rows = torch.cat([torch.full((length,), place) for place, length in enumerate(lengths)])[None]
    # each sequence attends to itself alone, by a mask
    mask = (rows[0, :, None] == rows[0, None, :]) & torch.ones(13, 13, dtype=torch.bool).tril()
    with model.mixture(ROWS[:3], rows=rows), torch.no_grad():
        got = model(input_ids=torch.cat(parts)[None], position_ids=position_ids, attention_mask=mask[None, None]).logits
    for part, found, weights in zip(parts, got[0].split(lengths), ROWS, strict=False):
        assert relative(found, true_logits(small_base, folders, weights, part)) < LOGITS


def test_left_padding_changes_nothing(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    parts = [random_ids(1, length, seed=length)[0] for length in (3, 8, 5)]
    ids = torch.zeros(3, 8, dtype=torch.int64)
    mask = torch.zeros(3, 8, dtype=torch.int64)
    for row, part in enumerate(parts):
        ids[row, 8 - len(part) :], mask[row, 8 - len(part) :] = part, 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with model.mixture(ROWS[:3]), torch.no_grad():
        got = model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    for row, part in enumerate(parts):
        want = true_logits(small_base, folders, ROWS[row], part)
        assert relative(got[row, 8 - len(part) :], want) < LOGITS


def test_gradients_reach_the_inputs_in_training_and_the_experts_stay(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    model.model.train()
    ids_BT = random_ids(2, 6)
    embedded = model.get_input_embeddings()(ids_BT).detach().requires_grad_()
    with model.mixture(ROWS[2:]):
        model(inputs_embeds=embedded).logits.square().sum().backward()
    for row, weights in enumerate(ROWS[2:]):
        named = [(folder, weights.get(folder.name, 0.0)) for folder in folders] if weights else []
        true = float64_model(small_base, [folder for folder, _ in named], [weight for _, weight in named])
        wanted = embedded.detach()[row : row + 1].double().requires_grad_()
        true(inputs_embeds=wanted).logits.square().sum().backward()
        assert embedded.grad is not None
        assert wanted.grad is not None
        assert relative(embedded.grad[row], wanted.grad[0]) < 10 * LOGITS  # through the model twice, and squared


def test_gpt2s_conv1d_is_a_linear_layer_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=320, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    shapes = {f"transformer.h.{layer}.attn.c_attn": (96, 32) for layer in (0, 1)}
    folders = [
        write_expert(tmp_path / "experts" / name, seed=place, shapes=shapes, fan_in_fan_out=True)
        for place, name in enumerate(("cold", "warm"))
    ]
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    model = SoupModel(base, ExpertLibrary.open(tmp_path / "experts"))
    ids_BT = random_ids(2, 7)
    rows: list[dict[str, float]] = [{"cold": 0.8}, {"cold": -0.4, "warm": 1.0}]
    with model.mixture(rows), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, weights in enumerate(rows):
        assert relative(got[row], true_logits(tmp_path / "base", folders, weights, ids_BT[row])) < LOGITS


def test_an_opt_whose_layers_are_given_tokens_laid_out_flat(tmp_path: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=320, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, word_embed_proj_dim=32,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    shapes = {f"model.decoder.layers.{layer}.fc1": (48, 32) for layer in (0, 1)}
    folders = [write_expert(tmp_path / "experts" / "warm", seed=2, shapes=shapes)]
    model = SoupModel(OPTForCausalLM.from_pretrained(tmp_path / "base").eval(), tmp_path / "experts")
    ids_BT = random_ids(3, 7)
    rows: list[dict[str, float] | None] = [{"warm": 0.8}, None, {"warm": -2.0}]
    with model.mixture(rows), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, weights in enumerate(rows):
        assert relative(got[row], true_logits(tmp_path / "base", folders, weights, ids_BT[row])) < LOGITS


def test_profiles_names_and_normalised_weights(tmp_path: Path, small_base: Path) -> None:
    folders = write_experts(tmp_path / "experts")
    model = open_model(small_base, tmp_path / "experts")
    model.profiles.add(Profile(user="u1", weights={"cold": 1.0, "warm": 3.0}, normalize="sum"))
    ids_BT = random_ids(3, 5)
    with model.mixture(["u1", "warm", Profile(weights={"plain": 0.5})]), torch.no_grad():
        got = model(input_ids=ids_BT).logits
    for row, weights in enumerate([{"cold": 0.25, "warm": 0.75}, {"warm": 1.0}, {"plain": 0.5}]):
        assert relative(got[row], true_logits(small_base, folders, weights, ids_BT[row])) < LOGITS
