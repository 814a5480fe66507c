"""Configure TRL's RewardTrainer from a recipe. The trainer is silent and exactly resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from peft import TaskType
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.utils import disable_dropout_in_model

from personalized_soups.declare.training import RewardRecipe
from personalized_soups.training.adapter_trainer import AdapterTrainer
from personalized_soups.training.encoding import EncodedPairs
from personalized_soups.training.order import LikeLengthOrder
from personalized_soups.training.trl_settings import common_arguments, lora_config, one_gpu


class RewardModelTrainer(AdapterTrainer, RewardTrainer):
    """A RewardTrainer that puts pairs of similar length in a batch.

    Args:
        recipe: the recipe, with the overrides of the side.
        model: the base with an output layer. PEFT wraps it in place.
        tokenizer: the base's tokenizer.
        pairs: the pairs as token ids.
        config: the configuration that `reward_config` returns.
    """

    def __init__(
        self, recipe: RewardRecipe, *, model: Any, tokenizer: Any, pairs: EncodedPairs, config: RewardConfig
    ) -> None:
        self.recipe = recipe
        # TRL turns off all dropout or none. This call turns off the base's dropout. PEFT adds LoRA's dropout later.
        disable_dropout_in_model(model)
        texts = [pair.cut(recipe.reward.max_length) for pair in pairs.pairs]
        rows = {
            "chosen_ids": [list(chosen) for chosen, _ in texts],
            "rejected_ids": [list(other) for _, other in texts],
        }
        super().__init__(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_dict(rows),
            processing_class=tokenizer,
            peft_config=lora_config(recipe, TaskType.SEQ_CLS),
        )
        self.finish()

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengthOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [max(map(len, texts)) for texts in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)]
        return self.by_length(lengths)


def reward_config(
    recipe: RewardRecipe, *, partial: Path, device: torch.device, model_dtype: torch.dtype, seed: int
) -> RewardConfig:
    """Return TRL's configuration for a recipe."""
    config = RewardConfig(
        **common_arguments(recipe, partial=partial, device=device, model_dtype=model_dtype, seed=seed),
        max_length=recipe.reward.max_length,
        center_rewards_coefficient=recipe.reward.center or None,
        disable_dropout=False,
    )
    return one_gpu(config)


def spare_id(pairs: EncodedPairs, tokenizer: Any) -> int:
    """Return a token id that pads texts and occurs in none of them.

    A classifier takes the reward at the last token that is not the padding id. If texts end with the padding id, as
    where the end token pads, it would take another token than in a batch without padding.
    """
    used = {token for pair in pairs.pairs for ids in pair.cut(pairs.max_length) for token in ids}
    own = tokenizer.pad_token_id
    if own is not None and own not in used:
        return int(own)
    return next(token for token in range(len(used) + 1) if token not in used)
