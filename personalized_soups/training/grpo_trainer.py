"""Configure TRL's GRPOTrainer from a recipe. The trainer is silent and exactly resumable."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import torch
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from personalized_soups.declare.training import GrpoRecipe
from personalized_soups.generation.prompts import messages_of
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.training.adapter_trainer import AdapterTrainer
from personalized_soups.training.order import GroupOrder
from personalized_soups.training.policy_reward import PolicyReward
from personalized_soups.training.trl_settings import common_arguments, lora_config, one_gpu


class PolicyTrainer(AdapterTrainer, GRPOTrainer):
    """A GRPOTrainer of the reward that a recipe names.

    The reference policy is the base without the adapter.

    Args:
        recipe: the recipe, with the overrides of the side.
        model: the base. PEFT wraps it in place.
        tokenizer: the base's tokenizer. Its chat template, if it has one, renders the prompts.
        prompts: the prompts.
        asked: the text of each prompt as the policy gets it, e.g. with the wanted preferences before it.
        reward: the reward of an answer to the plain prompt.
        config: the configuration that `grpo_config` returns.
    """

    def __init__(
        self,
        recipe: GrpoRecipe,
        *,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[str],
        asked: Sequence[str],
        reward: PolicyReward,
        config: GRPOConfig,
    ) -> None:
        self.recipe = self._policy = recipe
        self._prompts_per_batch = prompts_per_step(config)
        # TRL turns off all dropout or none. This call turns off the base's dropout. PEFT adds LoRA's dropout later.
        disable_dropout_in_model(model)
        tokenizer.padding_side = "left"

        def rewards(*, completions: Sequence[Any], plain: Sequence[str], **_: Any) -> list[float | None]:
            texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
            items = [TextItem(prompt, text.strip()) for prompt, text in zip(plain, texts, strict=True)]
            return [float(value) for value in reward.of_answers(items)]

        shown = [messages_of(text) for text in asked] if tokenizer.chat_template is not None else list(asked)
        super().__init__(
            model,
            reward_funcs=rewards,
            args=config,
            train_dataset=datasets.Dataset.from_dict({"prompt": shown, "plain": list(prompts)}),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        self.finish()

    def _get_train_sampler(self, dataset: Any = None) -> GroupOrder:
        """Return the order of the prompts. TRL's own order of an epoch depends on the epochs of the same process."""
        rows: Any = self.train_dataset if dataset is None else dataset
        self.order = GroupOrder(
            len(rows),
            group_size=self._policy.grpo.num_generations,
            prompts_per_batch=self._prompts_per_batch,
            repeats=self.recipe.optimizer.gradient_accumulation,
            seed=self.args.seed,
        )
        return self.order


def prompts_per_step(config: GRPOConfig) -> int:
    """Return the number of prompts whose answers are sampled for one optimizer step of all processes."""
    return int(config.generation_batch_size or 0) // int(config.num_generations or 1)


def grpo_config(
    recipe: GrpoRecipe, *, partial: Path, device: torch.device, model_dtype: torch.dtype, seed: int
) -> GRPOConfig:
    """Return TRL's configuration for a recipe.

    Answers are sampled anew for each step, so that a checkpoint needs none of them.
    """
    policy = recipe.grpo
    config = GRPOConfig(
        **common_arguments(recipe, partial=partial, device=device, model_dtype=model_dtype, seed=seed),
        beta=policy.beta,
        num_generations=policy.num_generations,
        max_completion_length=policy.max_new_tokens,
        temperature=policy.temperature,
        epsilon=policy.clip,
        scale_rewards="group" if policy.scale else "none",
        loss_type="dapo",
        num_iterations=1,
        steps_per_generation=recipe.optimizer.gradient_accumulation,
        remove_unused_columns=False,
        disable_dropout=False,
    )
    return one_gpu(config)
