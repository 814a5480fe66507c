"""Start the training of each method of `psoups train`. Declarations are checked before torch is imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from personalized_soups.cli.bases import resolve_base
from personalized_soups.cli.train.methods import MethodOptions, side_declarations, user_recipe


def training_of(chosen: MethodOptions, base: str, recipe: Path | None, options: dict[str, Any]) -> Callable[[], Path]:
    """Return the function that trains.

    Args:
        chosen: the method and its own options, which are checked.
        base: the base, as the user gave it.
        recipe: the recipe; None for the shipped one that suits method and base.
        options: the arguments that all trainings have: `data`, `out`, `device`, `seed`, `resume` and `progress`.

    Raises:
        DeclarationError: if the recipe or the catalogue is invalid, or lacks the side.
    """
    start = {"dpo": _dpo, "sft": _sft, "reward": _reward, "grpo": _grpo, "p-dpo": _p_dpo}[chosen.method]
    return start(chosen, base, recipe, options)


def _dpo(chosen: MethodOptions, base: str, recipe: Path | None, options: dict[str, Any]) -> Callable[[], Path]:
    from personalized_soups.declare.training import TrainingRecipe

    catalogue, declared = side_declarations(chosen.side, base, chosen.dimensions, recipe, TrainingRecipe)

    from personalized_soups.training.expert import train_expert

    given = {**options, "catalogue": catalogue, "recipe": declared, "on": chosen.on}
    return partial(train_expert, chosen.side or "", base=resolve_base(base), **given)


def _sft(chosen: MethodOptions, base: str, recipe: Path | None, options: dict[str, Any]) -> Callable[[], Path]:
    from personalized_soups.declare.training import SftRecipe

    catalogue, declared = side_declarations(None, base, chosen.dimensions, recipe, SftRecipe)

    from personalized_soups.training.sft import train_on_completions

    given = {**options, "catalogue": catalogue, "recipe": declared, "on": chosen.on}
    return partial(train_on_completions, chosen.side or "", base=resolve_base(base), **given)


def _reward(chosen: MethodOptions, base: str, recipe: Path | None, options: dict[str, Any]) -> Callable[[], Path]:
    from personalized_soups.declare.training import RewardRecipe

    catalogue, declared = side_declarations(chosen.side, base, chosen.dimensions, recipe, RewardRecipe)

    from personalized_soups.training.reward import train_reward_model

    given = {**options, "catalogue": catalogue, "recipe": declared}
    return partial(train_reward_model, chosen.side or "", base=resolve_base(base), **given)


def _grpo(chosen: MethodOptions, base: str, recipe: Path | None, options: dict[str, Any]) -> Callable[[], Path]:
    from personalized_soups.declare.training import GrpoRecipe

    weights, models = chosen.rewards.parsed()
    side = chosen.side if weights is None else None  # with rewards, a policy may have any name
    catalogue, declared = side_declarations(side, base, chosen.dimensions, recipe, GrpoRecipe)

    from personalized_soups.training.grpo import train_policy

    given = {**options, "catalogue": catalogue, "recipe": declared, "on": chosen.on, "prompts": options["data"]}
    del given["data"]
    rewards: dict[str, Any] = {"rewards": weights, "reward_models": models, "instruction": chosen.rewards.instruction}
    return partial(train_policy, chosen.side or "", base=resolve_base(base), **given, **rewards)


def _p_dpo(chosen: MethodOptions, base: str, recipe: Path | None, options: dict[str, Any]) -> Callable[[], Path]:
    declared = user_recipe(base, recipe, chosen.users)

    from personalized_soups.systems.p_rlhf.training import train_user_model

    return partial(train_user_model, base=resolve_base(base), recipe=declared, **options)
