"""The training of an adapter by DPO on preference pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.devices import resolve_device
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.training.data import Preferences, check_template
from personalized_soups.training.progress import TrainingProgress
from personalized_soups.training.run import Training

if TYPE_CHECKING:
    from personalized_soups.training.dpo_trainer import ExpertTrainer
    from personalized_soups.training.encoding import EncodedPairs


@dataclass(frozen=True, slots=True, kw_only=True)
class DpoTraining(Training):
    """A training by DPO. A training of another kind of loss on pairs is a subclass that makes another trainer.

    Attributes:
        recipe: the recipe, with the overrides of the side.
        preferences: the pairs.
    """

    recipe: TrainingRecipe
    preferences: Preferences

    logged: ClassVar[Mapping[str, str]] = MappingProxyType(
        {"margin": "rewards/margins", "accuracy": "rewards/accuracies"}
    )

    def trainer(self, pairs: EncodedPairs, **parts: Any) -> ExpertTrainer:
        """Return the trainer. `parts` are the arguments `model`, `tokenizer` and `config` of `ExpertTrainer`."""
        from personalized_soups.training.dpo_trainer import ExpertTrainer

        return ExpertTrainer(self.recipe, pairs=pairs, **parts)

    def build(self, *, partial: Path, device: str, progress: TrainingProgress) -> tuple[Any, dict[str, Any]]:
        """Return TRL's trainer, and facts on how the pairs were encoded, which a resumed training must share."""
        import torch

        from personalized_soups.generation.special_tokens import num_embeddings, pad_id, stop_ids
        from personalized_soups.training.dpo_trainer import dpo_config
        from personalized_soups.training.encoding import check_pairs, encode_pairs

        chosen = resolve_device(device)
        tokenizer = load_tokenizer(self.base)
        check_template(self.preferences, tokenizer)
        encoded = encode_pairs(self.preferences, tokenizer, max_length=self.recipe.dpo.max_length)
        # DPO's reference policy is the model without the expert's LoRA, so it is base + adapter, and it is frozen
        model = load_base(self.base, device=torch.device("cpu"), dtype=self.recipe.dtype, on=self.on)
        config = dpo_config(
            self.recipe,
            partial=partial,
            device=chosen,
            num_pairs=len(self.preferences.pairs),
            model_dtype=model.dtype,
            seed=self.record.seed or 0,
        )
        check_pairs(encoded, tokenizer, num_embeddings(model))
        pad = pad_id(tokenizer, num_embeddings(model))
        if pad != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        trainer = self.trainer(encoded, model=model, tokenizer=tokenizer, config=config)
        if config.process_index == 0:
            notes = encoded.notes(tokenizer, stop_ids(model, tokenizer))
            if not self.preferences.conversational and tokenizer.chat_template is not None:
                notes.append("the pairs are plain text, so they are trained without the tokenizer's chat template")
            for note in notes:
                progress.note(self.name, note)
        return trainer, encoded.changes()
