"""Train one expert on preference pairs with a frozen base, and write a PEFT adapter folder with expert.json."""

from __future__ import annotations

from pathlib import Path

from personalized_soups.adapters.base_adapter import open_on
from personalized_soups.adapters.provenance import BaseRecord, DataRecord, ExpertRecord, library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.training.data import read_preferences
from personalized_soups.training.dpo import DpoTraining
from personalized_soups.training.progress import Silent, TrainingProgress
from personalized_soups.training.run import run_training


def train_expert(
    side: str,
    *,
    base: str | Path,
    on: str | Path | None = None,
    data: Path,
    out: Path,
    recipe: TrainingRecipe,
    catalogue: Catalogue | None = None,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train the expert of one side by DPO on a frozen base, and return its folder.

    Args:
        side: the side of a preference dimension that the pairs favor.
        base: the base model: the name of a named base, a folder, a GGUF file or a hub id.
        on: the folder of a LoRA adapter, such as an SFT adapter. The reference policy is then the base with this
            adapter, both frozen. The expert is trained on top of both, and its folder holds only its own delta.
        data: preference pairs in TRL's format, JSON lines.
        out: the folder to write: adapter_config.json, adapter_model.safetensors, expert.json.
        recipe: the hyperparameters. `recipe.sides` may override some of them for this side.
        catalogue: declares the side's dimension, and must have the side. With None, the side is not checked.
        device: `auto`, `cpu` or `cuda`. Under torchrun, each process uses its own GPU.
        seed: random seed for LoRA's initial A and for the order of the pairs. On the same machine with the same number
            of threads, equal seeds give equal bytes.
        resume: continue from the last complete checkpoint, or start if there is none. The result equals that of an
            uninterrupted training. If `out` already holds this expert, nothing is trained.
        progress: receives the figures of every step.

    Raises:
        SoupError: if an input is wrong, `out` exists, another run writes to `out`, the loss diverges, or the disk or
            the GPU memory is full.

    Example:
        >>> folder = train_expert(  # doctest: +SKIP
        ...     "friendly",
        ...     base=TINY_BASE,
        ...     data=Path("friendly.jsonl"),
        ...     out=Path("experts/friendly"),
        ...     recipe=load(shipped_recipe("train/tiny.yaml"), TrainingRecipe),
        ... )
    """
    base = place_of(base)
    dimension = catalogue.side(side)[0] if catalogue is not None else None
    preferences = read_preferences(data)
    recipe = recipe.for_side(side)
    base_adapter = open_on(on)
    record = ExpertRecord(
        side=side,
        dimension=dimension,
        base=BaseRecord(name=str(base), fingerprint=None),
        on=None if base_adapter is None else base_adapter.record,
        recipe=recipe.model_dump(mode="json", exclude={"sides", "users"}),
        basis=recipe.basis,
        data=DataRecord(name=data.name, blake3=preferences.blake3, num_pairs=len(preferences.pairs)),
        seed=seed,
        versions=library_versions("torch", "transformers", "peft", "trl"),
        files=(CONFIG_FILE, WEIGHTS_FILE),
    )
    return run_training(
        DpoTraining(
            name=side, base=base, out=out, recipe=recipe, preferences=preferences, record=record, on=base_adapter
        ),
        device=device,
        resume=resume,
        progress=progress or Silent(),
    )
