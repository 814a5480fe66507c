"""Two processes train one user model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from personalized_soups.declare.loader import dump
from personalized_soups.declare.training import TrainingRecipe
from personalized_soups.systems.p_rlhf.training import train_user_model
from tests import oracles


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("alpha", [0.6, 0.0])
def test_two_processes_take_the_steps_of_one(
    small_base: Path, pairs_file: Path, recipe: TrainingRecipe, tmp_path: Path, alpha: float
) -> None:
    # Two processes with two pairs each see the four pairs of one process in the first step. With alpha 0, no row has a
    # user's offset, and the processes must agree on that too.
    users = recipe.users.replaced(alpha=alpha)  # type: ignore[union-attr]
    lora, dpo = recipe.lora.replaced(dropout=0.0), recipe.dpo.replaced(sft_weight=0.0)
    optimizer = recipe.optimizer.replaced(epochs=None, max_steps=1, warmup_steps=0, batch_size=2)
    halves = recipe.replaced(users=users, lora=lora, dpo=dpo, optimizer=optimizer)
    (tmp_path / "recipe.yaml").write_text(dump(halves))
    out = tmp_path / "two" / "people"
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "personalized_soups", "train"]
    options = ["--method", "p-dpo", "--base", small_base, "--data", pairs_file, "--recipe", tmp_path / "recipe.yaml"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *map(str, options), "--device", "cpu", "--out", str(out), "--json"],
        capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["metrics"]["num_steps"] == 1  # one object: the second process prints nothing
    assert sorted(path.name for path in out.parent.iterdir()) == ["people"]
    whole = halves.replaced(optimizer=optimizer.replaced(batch_size=2, gradient_accumulation=2))
    one = train_user_model(base=small_base, data=pairs_file, out=tmp_path / "one", recipe=whole, device="cpu")
    first, second = (oracles.read_tensors(folder / "user_model.safetensors") for folder in (out, one))
    assert first.keys() == second.keys()
    for name, table in first.items():
        # Adam's first step is the learning rate times the sign of each gradient. Where sums differ in their rounding,
        # only gradients near 0 may change their sign.
        assert float(np.mean(np.abs(table - second[name]) > 1e-4)) < 0.01, name
