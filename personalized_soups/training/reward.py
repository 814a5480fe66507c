"""Train a reward model on preference pairs: a base with LoRA and one output (Bradley and Terry 1952)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from personalized_soups.adapters.provenance import BaseRecord, DataRecord, ExpertRecord, library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import RewardRecipe
from personalized_soups.devices import resolve_device
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.training.data import Preferences, check_template, read_preferences
from personalized_soups.training.progress import Silent, TrainingProgress
from personalized_soups.training.run import Training, run_training


def train_reward_model(
    side: str,
    *,
    base: str | Path,
    data: Path,
    out: Path,
    recipe: RewardRecipe,
    catalogue: Catalogue | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train a reward model for one side on a frozen base, and return its folder, which `RewardModels` opens.

    The folder is a PEFT adapter for sequence classification: LoRA, and the output layer.

    Args:
        side: the side that the pairs favor.
        base: the base model: the name of a named base, a folder, a GGUF file or a hub id.
        data: preference pairs in TRL's format, JSON lines.
        out: the folder to write: adapter_config.json, adapter_model.safetensors, expert.json.
        recipe: the hyperparameters. `recipe.sides` may override some of them for this side.
        catalogue, device, resume, progress: as for `train_expert`.
        seed: random seed for LoRA's initial A, the output layer and the order of the pairs.

    Raises:
        SoupError: in the same cases as `train_expert`.

    Example:
        >>> folder = train_reward_model(  # doctest: +SKIP
        ...     "friendly",
        ...     base="smollm2",
        ...     data=Path("friendly.jsonl"),
        ...     out=Path("rewards/friendly"),
        ...     recipe=load(shipped_recipe("train/reward-smollm2.yaml"), RewardRecipe),
        ... )
    """
    base = place_of(base)
    dimension = catalogue.side(side)[0] if catalogue is not None else None
    preferences = read_preferences(data)
    recipe = recipe.for_side(side)
    record = ExpertRecord(
        side=side,
        dimension=dimension,
        base=BaseRecord(name=str(base), fingerprint=None),
        method="reward",
        recipe=recipe.model_dump(mode="json", exclude={"sides"}),
        basis=recipe.basis,
        data=DataRecord(name=data.name, blake3=preferences.blake3, num_pairs=len(preferences.pairs)),
        seed=seed,
        versions=library_versions("torch", "transformers", "peft", "trl"),
        files=(CONFIG_FILE, WEIGHTS_FILE),
    )
    training = RewardTraining(name=side, base=base, out=out, recipe=recipe, preferences=preferences, record=record)
    return run_training(training, device=device, resume=resume, progress=progress or Silent())


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardTraining(Training):
    """A training of a reward model.

    Attributes:
        recipe: the recipe, with the overrides of the side.
        preferences: the pairs.
    """

    recipe: RewardRecipe
    preferences: Preferences

    logged: ClassVar[Mapping[str, str]] = MappingProxyType({"margin": "margin", "accuracy": "accuracy"})

    def build(self, *, partial: Path, device: str, progress: TrainingProgress) -> tuple[Any, dict[str, Any]]:
        """Return TRL's trainer, and facts on how the pairs were encoded, which a resumed training must share."""
        from personalized_soups.generation.special_tokens import num_embeddings
        from personalized_soups.scoring.reward_model_files import load_untrained_reward_model
        from personalized_soups.training.encoding import check_pairs, encode_pairs
        from personalized_soups.training.reward_trainer import RewardModelTrainer, reward_config, spare_id

        chosen = resolve_device(device)
        tokenizer = load_tokenizer(self.base)
        check_template(self.preferences, tokenizer)
        encoded = encode_pairs(self.preferences, tokenizer, max_length=self.recipe.reward.max_length)
        model = load_untrained_reward_model(self.base, dtype=self.recipe.dtype, seed=self.record.seed or 0)
        check_pairs(encoded, tokenizer, num_embeddings(model))
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spare_id(encoded, tokenizer))
        config = reward_config(
            self.recipe, partial=partial, device=chosen, model_dtype=model.dtype, seed=self.record.seed or 0
        )
        trainer = RewardModelTrainer(self.recipe, model=model, tokenizer=tokenizer, pairs=encoded, config=config)
        if config.process_index == 0:
            for note in encoded.notes(tokenizer, frozenset({int(tokenizer.eos_token_id)})):
                progress.note(self.name, note)
        return trainer, encoded.changes()
