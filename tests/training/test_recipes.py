"""Every shipped recipe trains, with the method of its kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import load
from personalized_soups.declare.shipped import recipes_folder
from personalized_soups.declare.training import GrpoRecipe, OptimizerRecipe, RewardRecipe, SftRecipe, TrainingRecipe
from personalized_soups.training.expert import train_expert
from personalized_soups.training.grpo import train_policy
from personalized_soups.training.reward import train_reward_model
from personalized_soups.training.sft import train_on_completions

RECIPES = sorted((recipes_folder() / "train").glob("*.yaml"))
CATALOGUE = Catalogue.model_validate_json(
    """{"dimensions": {"length": {"about": "length", "scorer": {"kind": "length", "low": 0, "high": 10},
        "sides": {"x": {"instruction": "Tell all."}}}}}"""
)


def two_steps(optimizer: OptimizerRecipe, batch_size: int = 2) -> OptimizerRecipe:
    return optimizer.replaced(epochs=None, max_steps=2, batch_size=batch_size, gradient_accumulation=2)


def train(path: Path, base: Path, pairs: Path, out: Path) -> Path:
    """Train two small steps with a recipe."""
    kind = path.name.split("-")[0]
    if kind == "grpo":
        policy = load(path, GrpoRecipe)
        short = policy.grpo.replaced(num_generations=2, max_new_tokens=4)
        policy = policy.replaced(grpo=short, optimizer=two_steps(policy.optimizer))
        prompts = out.with_suffix(".txt")
        prompts.write_text("wash the kettle\nrub it dry\n")
        return train_policy("x", base=base, prompts=prompts, out=out, recipe=policy, catalogue=CATALOGUE, device="cpu")
    if kind == "reward":
        reward = load(path, RewardRecipe)
        reward = reward.replaced(optimizer=two_steps(reward.optimizer), reward=reward.reward.replaced(max_length=64))
        return train_reward_model("x", base=base, data=pairs, out=out, recipe=reward, device="cpu")
    if kind == "sft":
        sft = load(path, SftRecipe)
        sft = sft.replaced(optimizer=two_steps(sft.optimizer), sft=sft.sft.replaced(max_length=64))
        return train_on_completions("x", base=base, data=pairs, out=out, recipe=sft, device="cpu")
    dpo = load(path, TrainingRecipe)
    dpo = dpo.replaced(optimizer=two_steps(dpo.optimizer), dpo=dpo.dpo.replaced(max_length=64), sides={})
    return train_expert("x", base=base, data=pairs, out=out, recipe=dpo, device="cpu")


def test_there_are_recipes_of_every_kind() -> None:
    assert {path.name.split("-")[0] for path in RECIPES} >= {"grpo", "reward", "sft", "tiny.yaml"}


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_every_shipped_recipe_trains(path: Path, small_base: Path, pairs_file: Path, tmp_path: Path) -> None:
    out = train(path, small_base, pairs_file, tmp_path / "e")
    tensors = load_file(out / "adapter_model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    assert json.loads((out / "expert.json").read_text())["metrics"]["num_steps"] == 2
    # rewards may be equal in every group, and then a policy learns nothing
    is_trained = any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    assert is_trained or path.name.startswith("grpo")
