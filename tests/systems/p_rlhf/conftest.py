from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.systems.p_rlhf.training import train_user_model

RECIPE = """{
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "dpo": {"beta": 0.3, "sft_weight": 0.5, "max_length": 64},
    "optimizer": {"learning_rate": 0.005, "warmup_steps": 2, "epochs": 2, "batch_size": 4},
    "save_steps": 3,
    "users": {"model": "individual", "tokens": 3, "alpha": 0.6}
}"""
USERS = ("ada", "bob", None, "cleo \u00e9")


@pytest.fixture(scope="session")
def recipe() -> TrainingRecipe:
    """Eight steps in two epochs of four, with dropout, so that a resumed training needs every random state."""
    return TrainingRecipe.model_validate_json(RECIPE)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen conversations of three users and of nobody. Ada likes the longer answer."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = []
    for number in range(15):
        user = USERS[number % 4]
        answers = [f"rub the kettle {number}", "wash the old towel with warm water " * (1 + number % 2)]
        row = dict(zip(("chosen", "rejected"), answers[:: -1 if user == "ada" else 1], strict=True))
        messages: dict[str, object] = {name: [{"role": "assistant", "content": text}] for name, text in row.items()}
        messages["prompt"] = [{"role": "user", "content": f"how to wash the kettle {number}?"}]
        lines.append(json.dumps(messages | ({} if user is None else {"user": user})))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="session")
def trained(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A user model of the small base. Tests must not change it."""
    out = tmp_path_factory.mktemp("users") / "people"
    return train_user_model(base=small_base, data=pairs_file, out=out, recipe=recipe, device="cpu")
