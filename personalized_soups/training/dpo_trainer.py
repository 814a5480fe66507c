"""Configure TRL's DPOTrainer from a recipe. The trainer is silent and exactly resumable."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import torch
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.utils import disable_dropout_in_model

from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.training.adapter_trainer import AdapterTrainer
from personalized_soups.training.encoding import EncodedPairs
from personalized_soups.training.order import LikeLengthOrder
from personalized_soups.training.trl_settings import common_arguments, lora_config, num_processes, one_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# The reference pass stores no activations, so that one of its batches can hold this many training batches.
REFERENCE_BATCHES = 4


class ExpertTrainer(AdapterTrainer, DPOTrainer):
    """A DPOTrainer that puts pairs of similar length in a batch.

    Args:
        recipe: the recipe, with the overrides of the side.
        model: the base. PEFT wraps it in place.
        tokenizer: the base's tokenizer.
        pairs: the pairs as token ids.
        config: the configuration that `trainer_config` returns.
    """

    def __init__(
        self,
        recipe: TrainingRecipe,
        *,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        pairs: EncodedPairs,
        config: DPOConfig,
    ) -> None:
        self.recipe = recipe
        # TRL turns off all dropout or none. This call turns off the base's dropout. PEFT adds LoRA's dropout later.
        disable_dropout_in_model(model)
        super().__init__(
            model,
            args=config,
            # The data set stays in memory, because a cache on disk could pass the data of one training to another.
            train_dataset=datasets.Dataset.from_dict(self.columns(pairs)),
            processing_class=tokenizer,
            peft_config=lora_config(recipe),
        )
        self.finish()

    def columns(self, pairs: EncodedPairs) -> dict[str, list[Any]]:
        """Return the columns of the data set."""
        return pairs.columns()

    def _get_train_sampler(self, train_dataset: Any = None) -> LikeLengthOrder:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        answers = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
        longest = [max(len(chosen), len(rejected)) for chosen, rejected in answers]
        lengths = [len(prompt) + answer for prompt, answer in zip(rows["prompt_ids"], longest, strict=True)]
        return self.by_length(lengths)


def dpo_config(
    recipe: TrainingRecipe, *, partial: Path, device: torch.device, num_pairs: int, model_dtype: torch.dtype, seed: int
) -> DPOConfig:
    """Return TRL's configuration for a recipe.

    With one process and more than one epoch, the reference log-probabilities are computed once, before the steps. For a
    single epoch, computing them in each step costs the same. Several processes also compute them in each step, because
    they would all use the same file for them.
    """
    optimizer = recipe.optimizer
    seen_per_step = optimizer.batch_size * optimizer.gradient_accumulation * num_processes()
    epochs = optimizer.epochs or (optimizer.max_steps or 0) * seen_per_step / num_pairs
    config = DPOConfig(
        **common_arguments(recipe, partial=partial, device=device, model_dtype=model_dtype, seed=seed),
        loss_type=["sigmoid", "sft"] if recipe.dpo.sft_weight else ["sigmoid"],
        loss_weights=[1.0, recipe.dpo.sft_weight] if recipe.dpo.sft_weight else [1.0],
        beta=recipe.dpo.beta,
        max_length=recipe.dpo.max_length,
        disable_dropout=False,
        precompute_ref_log_probs=num_processes() == 1 and epochs > 1,
        precompute_ref_batch_size=REFERENCE_BATCHES * optimizer.batch_size,
    )
    return one_gpu(config)
