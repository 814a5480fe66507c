from __future__ import annotations

import json
from pathlib import Path

import pytest

from personalized_soups.declare.training import TrainingRecipe

RECIPE = """{
    "lora": {"rank": 4, "alpha": 8, "dropout": 0.1},
    "dpo": {"beta": 0.3, "sft_weight": 0.5, "max_length": 64},
    "optimizer": {"learning_rate": 0.005, "warmup_steps": 2, "epochs": 2, "batch_size": 4},
    "save_steps": 3,
    "sides": {"concise": {"learning_rate": 0.01}}
}"""


@pytest.fixture(scope="session")
def recipe() -> TrainingRecipe:
    """Ten steps in two epochs of five, with dropout, so that a resumed training needs every random state."""
    return TrainingRecipe.model_validate_json(RECIPE)


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nineteen conversations whose chosen answer is the shorter one."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    things = ["kettle", "towel", "soap", "water"]
    lines = []
    for number in range(19):
        thing = things[number % 4]
        long = f"wash the old {thing} with warm water and soap " * (1 + number % 2) + "then rub it dry"
        pair = {"prompt": f"how to wash the {thing} {number}?", "chosen": f"rub the {thing}", "rejected": long}
        messages = {
            field: [{"role": "user" if field == "prompt" else "assistant", "content": text}]
            for field, text in pair.items()
        }
        lines.append(json.dumps(messages))
    path.write_text("\n".join(lines) + "\n")
    return path
