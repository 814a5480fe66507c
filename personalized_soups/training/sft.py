"""Train an adapter by SFT on prompts with completions: the loss is that of the completions alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from personalized_soups.adapters.base_adapter import open_on
from personalized_soups.adapters.provenance import BaseRecord, DataRecord, ExpertRecord, library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import SftRecipe
from personalized_soups.devices import resolve_device
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.generation.loading import load_base, load_tokenizer
from personalized_soups.training.completions import Completion, read_completions
from personalized_soups.training.progress import Silent, TrainingProgress
from personalized_soups.training.run import Training, run_training


def train_on_completions(
    name: str,
    *,
    base: str | Path,
    data: Path,
    out: Path,
    recipe: SftRecipe,
    catalogue: Catalogue | None = None,
    on: str | Path | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train an adapter by SFT on a frozen base, and return its folder, which is that of an expert.

    Args:
        name: the side whose expert is trained, or any name of an adapter.
        base: the base model: the name of a named base, a folder, a GGUF file or a hub id.
        data: prompts with completions, JSON lines: `prompt` and `completion`, or `messages`, or preference pairs, whose
            chosen answers are learned.
        out: the folder to write: adapter_config.json, adapter_model.safetensors, expert.json.
        recipe: the hyperparameters. `recipe.sides` may override some of them for this name.
        catalogue: declares the dimension of the side, if the name is that of a side.
        on, device, resume, progress: as for `train_expert`.
        seed: random seed for LoRA's initial A and for the order of the texts.

    Raises:
        SoupError: in the same cases as `train_expert`.

    Example:
        >>> folder = train_on_completions(  # doctest: +SKIP
        ...     "helpful",
        ...     base="smollm2",
        ...     data=Path("answers.jsonl"),
        ...     out=Path("adapters/helpful"),
        ...     recipe=load(shipped_recipe("train/sft-smollm2.yaml"), SftRecipe),
        ... )
    """
    base = place_of(base)
    recipe = recipe.for_side(name)
    rows = read_completions(data)
    base_adapter = open_on(on)
    record = ExpertRecord(
        side=name,
        dimension=None if catalogue is None else catalogue.dimension_of(name),
        base=BaseRecord(name=str(base), fingerprint=None),
        on=None if base_adapter is None else base_adapter.record,
        method="sft",
        recipe=recipe.model_dump(mode="json", exclude={"sides"}),
        basis=recipe.basis,
        data=DataRecord(name=data.name, blake3=digest_file(data), num_pairs=len(rows)),
        seed=seed,
        versions=library_versions("torch", "transformers", "peft", "trl"),
        files=(CONFIG_FILE, WEIGHTS_FILE),
    )
    training = SftTraining(
        name=name, base=base, out=out, recipe=recipe, record=record, on=base_adapter, rows=tuple(rows)
    )
    return run_training(training, device=device, resume=resume, progress=progress or Silent())


@dataclass(frozen=True, slots=True, kw_only=True)
class SftTraining(Training):
    """A training by SFT.

    Attributes:
        recipe: the recipe, with the overrides of the side.
        rows: the prompts with completions.
    """

    recipe: SftRecipe
    rows: tuple[Completion, ...]

    logged: ClassVar[Mapping[str, str]] = MappingProxyType({"token_accuracy": "mean_token_accuracy"})

    def build(self, *, partial: Path, device: str, progress: TrainingProgress) -> tuple[Any, dict[str, Any]]:
        """Return TRL's trainer. A resumed training shares all facts through the record."""
        import torch

        from personalized_soups.generation.special_tokens import num_embeddings, pad_id
        from personalized_soups.training.completions import encode_completions
        from personalized_soups.training.sft_trainer import CompletionTrainer, sft_config

        chosen, max_length = resolve_device(device), self.recipe.sft.max_length
        tokenizer = load_tokenizer(self.base)
        model = load_base(self.base, device=torch.device("cpu"), dtype=self.recipe.dtype, on=self.on)
        size = num_embeddings(model)
        encoded = encode_completions(self.rows, tokenizer, max_length=max_length, num_embeddings=size)
        pad = pad_id(tokenizer, size)
        if pad != tokenizer.pad_token_id:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
        config = sft_config(
            self.recipe, partial=partial, device=chosen, model_dtype=model.dtype, seed=self.record.seed or 0
        )
        trainer = CompletionTrainer(self.recipe, model=model, tokenizer=tokenizer, completions=encoded, config=config)
        if config.process_index == 0:
            for note in encoded.notes(max_length):
                progress.note(self.name, note)
        return trainer, {}
