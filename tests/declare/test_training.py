from __future__ import annotations

import pytest

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.declare.loader import dump, load, load_text
from personalized_soups.declare.shipped import recipes_folder, shipped_recipe
from personalized_soups.declare.training import AdapterRecipe, GrpoRecipe, RewardRecipe, SftRecipe, TrainingRecipe
from personalized_soups.errors import DeclarationError, UsageError

MINIMAL = """
lora: {rank: 4, alpha: 8}
dpo: {beta: 0.1, max_length: 64}
optimizer: {learning_rate: 1e-3, max_steps: 10, batch_size: 2}
"""


def recipe(extra: str = "") -> TrainingRecipe:
    return load_text(MINIMAL + extra, TrainingRecipe, "r.yaml")


def test_the_defaults_are_plain_lora_on_all_linear_layers() -> None:
    minimal = recipe()
    assert (minimal.basis, minimal.lora.target_modules, minimal.lora.rslora) == ("free", "all-linear", False)
    assert (minimal.lora.dropout, minimal.dpo.sft_weight, minimal.dtype) == (0.0, 1.0, "float32")


def test_the_7b_recipe_has_the_papers_lora() -> None:
    lora = load(shipped_recipe("train/llama-7b.yaml"), TrainingRecipe).lora
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0.05)


# The recipes of a kind other than DPO have its prefix.
KINDS: dict[str, type[AdapterRecipe]] = {"reward": RewardRecipe, "grpo": GrpoRecipe, "sft": SftRecipe}


def test_every_shipped_training_recipe_loads_and_dumps() -> None:
    paths = sorted((recipes_folder() / "train").rglob("*.yaml"))
    bases = ["llama-7b.yaml", "smollm2.yaml", "tiny.yaml"]
    of_kinds = [f"{prefix}-{base}" for prefix in KINDS for base in bases]
    assert [path.name for path in paths] == sorted(
        [*bases, "persona.yaml", "tiny-core.yaml", "tiny-shared.yaml", *of_kinds]
    )
    for path in paths:
        kind = KINDS.get(path.name.split("-")[0], TrainingRecipe)
        loaded = load(path, kind)
        assert load_text(dump(loaded), kind, "dumped") == loaded


def test_the_tiny_recipe_overrides_only_sides_that_exist() -> None:
    sides = load(shipped_recipe("dimensions/tiny.yaml"), Catalogue).sides
    assert set(load(shipped_recipe("train/tiny.yaml"), TrainingRecipe).sides) <= set(sides)


def test_overrides_of_a_side_reach_the_optimizer_and_the_loss() -> None:
    loaded = recipe("sides:\n  a: {learning_rate: 5e-3, beta: 0.7, epochs: 2}\n  b: {max_steps: 3, sft_weight: 0}\n")
    a, b, other = loaded.for_side("a"), loaded.for_side("b"), loaded.for_side("c")
    assert (a.optimizer.learning_rate, a.dpo.beta, a.dpo.sft_weight) == (5e-3, 0.7, 1.0)
    assert (a.optimizer.epochs, a.optimizer.max_steps) == (2.0, None)
    assert (b.optimizer.max_steps, b.dpo.sft_weight, b.optimizer.learning_rate) == (3, 0.0, 1e-3)
    assert other == recipe()
    assert (a.sides, b.sides, other.sides) == ({}, {}, {})


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        (MINIMAL.replace("max_steps: 10, ", ""), "r.yaml:4: optimizer", "neither is given"),
        (MINIMAL.replace("max_steps: 10", "max_steps: 10, epochs: 1"), "r.yaml:4: optimizer", "both are given"),
        (MINIMAL.replace("rank: 4", "rank: 0"), "r.yaml:2: lora.rank", "greater than 0"),
        (MINIMAL + "sides:\n  a: {learning_rat: 1}", "r.yaml:6: sides.a.learning_rat", "unknown key"),
        (MINIMAL + "sides:\n  a: {epochs: 1, max_steps: 1}", "r.yaml:6: sides.a", "both"),
        (MINIMAL + "dtype: float16", "r.yaml:5: dtype", "'float16' is not a valid dtype"),
        (MINIMAL + "basis: common", "r.yaml:5: basis", "'common' is not a valid basis"),
    ],
)
def test_faults_have_file_line_and_key(text: str, where: str, what: str) -> None:
    with pytest.raises(DeclarationError) as caught:
        load_text(text, TrainingRecipe, "r.yaml")
    assert caught.value.where == where
    assert what in caught.value.what


def test_target_modules_are_a_list_or_all_linear() -> None:
    text = MINIMAL.replace("alpha: 8", "alpha: 8, target_modules: [q_proj, v_proj]")
    assert load_text(text, TrainingRecipe, "r.yaml").lora.target_modules == ("q_proj", "v_proj")
    with pytest.raises(DeclarationError, match="all-linear"):
        load_text(MINIMAL.replace("alpha: 8", "alpha: 8, target_modules: q_proj"), TrainingRecipe, "r.yaml")


def test_an_unknown_shipped_recipe_gets_the_nearest_name() -> None:
    with pytest.raises(UsageError) as caught:
        shipped_recipe("train/tiney.yaml")
    assert caught.value.mend == "did you mean 'train/tiny.yaml'?"
