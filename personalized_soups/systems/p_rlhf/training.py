"""Train a user model and its adapter on the preference pairs of many users, and write one folder with both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from personalized_soups.adapters.provenance import BaseRecord, DataRecord, ExpertRecord, library_versions
from personalized_soups.bases.place import place_of
from personalized_soups.declare.training import TrainingRecipe, UsersRecipe
from personalized_soups.errors import InputError
from personalized_soups.files.file_names import CONFIG_FILE, WEIGHTS_FILE
from personalized_soups.systems.p_rlhf.user_model import RECORD_FILE, TABLES_FILE, write_user_model
from personalized_soups.training.data import Preferences, read_preferences
from personalized_soups.training.dpo import DpoTraining
from personalized_soups.training.progress import Silent, TrainingProgress
from personalized_soups.training.run import run_training


def train_user_model(
    *,
    base: str | Path,
    data: Path,
    out: Path,
    recipe: TrainingRecipe,
    device: str = "auto",
    seed: int = 0,
    resume: bool = False,
    progress: TrainingProgress | None = None,
) -> Path:
    """Train soft tokens for each user and one LoRA adapter for all users by P-DPO, and return their folder.

    Args:
        base: the base model: the name of a named base, a folder, a GGUF file or a hub id.
        data: preference pairs in TRL's format, JSON lines, in which `user` is the id of the user who compared the
            answers, and `user_text` may describe the user in words.
        out: the folder to write: the files of an expert, user_model.json and user_model.safetensors.
        recipe: the hyperparameters. `recipe.users` has those of the user model; without it, its defaults apply.
        device, resume, progress: as for `train_expert`.
        seed: random seed for LoRA's initial A, the initial tables and the order of the pairs.

    Raises:
        SoupError: in the same cases as `train_expert`, and if no pair names its user although the kind of user model
            distinguishes users.
    """
    base = place_of(base)
    preferences = read_preferences(data, with_users=True)
    recipe = recipe.for_side("").replaced(users=recipe.users or UsersRecipe())
    assert recipe.users is not None
    users = tuple(sorted({pair["user"] for pair in preferences.pairs if "user" in pair}))
    _check_users(users, recipe.users, preferences)
    record = ExpertRecord(
        side=None,
        base=BaseRecord(name=str(base), fingerprint=None),
        recipe=recipe.model_dump(mode="json", exclude={"sides"}),
        basis=recipe.basis,
        data=DataRecord(name=data.name, blake3=preferences.blake3, num_pairs=len(preferences.pairs)),
        seed=seed,
        versions=library_versions("torch", "transformers", "peft", "trl"),
        files=(CONFIG_FILE, WEIGHTS_FILE, RECORD_FILE, TABLES_FILE),
    )
    training = _UserTraining(
        name=out.name, base=base, out=out, recipe=recipe, preferences=preferences, record=record, users=users
    )
    return run_training(training, device=device, resume=resume, progress=progress or Silent())


@dataclass(frozen=True, slots=True, kw_only=True)
class _UserTraining(DpoTraining):
    users: Sequence[str] = ()

    def trainer(self, pairs: Any, **parts: Any) -> Any:
        from personalized_soups.systems.p_rlhf.user_trainer import UserTrainer

        return UserTrainer(self.recipe, pairs=pairs, users=self.users, seed=self.record.seed or 0, **parts)

    def write(self, trainer: Any, folder: Path, record: ExpertRecord) -> None:
        DpoTraining.write(self, trainer, folder, record)
        write_user_model(folder, trainer.tables, users=self.users, base=record.base)


def _check_users(users: Sequence[str], recipe: UsersRecipe, preferences: Preferences) -> None:
    if not users and recipe.model != "uninformative":
        raise InputError(
            f"no pair names its user, but the user model {recipe.model!r} learns about each user",
            where=str(preferences.path),
            mend='write "user": "u1042" in the lines, or train the user model "uninformative"',
        )
