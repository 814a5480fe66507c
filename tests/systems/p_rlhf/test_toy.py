"""Seven users like longer answers, and three like shorter ones: P-DPO serves both, and DPO the majority only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from personalized_soups import Generator, TrainingRecipe, train_expert
from personalized_soups.systems.p_rlhf.training import train_user_model
from personalized_soups.systems.p_rlhf.user_model import UserModel
from tests.systems.p_rlhf.toy import MAJORITY, MINORITY, accuracy, pair, write_base, write_pairs

_STEPS = 200


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    write_base(folder / "base", seed=0)
    write_pairs(folder / "pairs.jsonl", 32 * _STEPS, seed=0)
    return folder


def _recipe(users: dict[str, Any] | None) -> TrainingRecipe:
    recipe = {
        "lora": {"rank": 16, "alpha": 32},
        "dpo": {"beta": 0.5, "sft_weight": 0.0, "max_length": 32},
        "optimizer": {"learning_rate": 1e-3, "schedule": "constant", "max_steps": _STEPS, "batch_size": 32},
        "save_steps": 1000,
        "users": users,
    }
    return TrainingRecipe.model_validate_json(json.dumps(recipe))


def _accuracies(toy: Path, folder: Path, users: UserModel | None) -> tuple[float, float]:
    """Return the mean accuracy of the majority and of the minority on 40 new pairs of each user."""
    random = np.random.default_rng([0, 2])
    base, policy = Generator.open(toy / "base", device="cpu"), Generator.open(toy / "base", folder, device="cpu")
    found = []
    for group in (MAJORITY, MINORITY):
        shares = []
        for user in group:
            pairs = [pair(random, user) for _ in range(40)]
            soft = None if users is None else users.soft_tokens(user)
            shares.append(accuracy(base.model, policy.model, base.tokenizer, pairs, soft))
        found.append(float(np.mean(shares)))
    return found[0], found[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_p_dpo_serves_the_minority_too(toy: Path, kind: str) -> None:
    users = {"model": kind, "tokens": 4, "clusters": 2, "alpha": 0.5}
    out = train_user_model(
        base=toy / "base", data=toy / "pairs.jsonl", out=toy / kind, recipe=_recipe(users), device="cpu"
    )
    majority, minority = _accuracies(toy, out, UserModel.open(out))
    assert minority >= 0.97
    assert majority >= 0.9


@pytest.mark.slow
def test_dpo_serves_the_majority_only(toy: Path) -> None:
    out = train_expert(
        "long", base=toy / "base", data=toy / "pairs.jsonl", out=toy / "dpo", recipe=_recipe(None), device="cpu"
    )
    majority, minority = _accuracies(toy, out, None)
    assert minority <= 0.16  # the published toy: .08; twice that leaves room for the noise of 120 pairs
    assert majority >= 0.9
