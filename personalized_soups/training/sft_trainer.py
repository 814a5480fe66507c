"""Configure TRL's SFTTrainer from a recipe. The trainer is silent and exactly resumable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import disable_dropout_in_model

from personalized_soups.declare.training import SftRecipe
from personalized_soups.training.adapter_trainer import AdapterTrainer
from personalized_soups.training.completions import EncodedCompletions
from personalized_soups.training.order import LikeLengthOrder
from personalized_soups.training.trl_settings import common_arguments, lora_config, one_gpu


class CompletionTrainer(AdapterTrainer, SFTTrainer):
    """An SFTTrainer that puts texts of similar length in a batch.

    Args:
        recipe: the recipe, with the overrides of the side.
        model: the base. PEFT wraps it in place.
        tokenizer: the base's tokenizer.
        completions: the completions as token ids.
        config: the configuration that `sft_config` returns.
    """

    def __init__(
        self, recipe: SftRecipe, *, model: Any, tokenizer: Any, completions: EncodedCompletions, config: SFTConfig
    ) -> None:
        self.recipe = recipe
        # TRL turns off no dropout. This call turns off the base's dropout. PEFT adds LoRA's dropout later.
        disable_dropout_in_model(model)
        super().__init__(
            model,
            args=config,
            train_dataset=datasets.Dataset.from_dict(completions.columns()),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        self.finish()

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengthOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(ids) for ids in rows["input_ids"]]
        return self.by_length(lengths)


def sft_config(
    recipe: SftRecipe, *, partial: Path, device: torch.device, model_dtype: torch.dtype, seed: int
) -> SFTConfig:
    """Return TRL's configuration for a recipe. The loss is the mean over all tokens of the answers of a step."""
    config = SFTConfig(
        **common_arguments(recipe, partial=partial, device=device, model_dtype=model_dtype, seed=seed),
        max_length=recipe.sft.max_length,
        loss_type="nll",
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    return one_gpu(config)
