from __future__ import annotations

import pytest

from personalized_soups.declare.evaluation import StudyRecipe
from personalized_soups.declare.loader import dump, load, load_text
from personalized_soups.declare.shipped import recipes_folder
from personalized_soups.errors import DeclarationError


def test_every_shipped_study_loads_and_dumps() -> None:
    paths = sorted((recipes_folder() / "evaluation").rglob("*.yaml"))
    assert [path.name for path in paths] == ["quickstart.yaml"]
    recipe = load(paths[0], StudyRecipe)
    assert load_text(dump(recipe), StudyRecipe, "dump") == recipe
    assert recipe.num_prompts >= 96


@pytest.mark.parametrize(
    ("line", "changed", "what"),
    [
        ("linear: [0.4, 0.5, 0.6]", "linear: [0.4, 0.6, 0.5]", "not in rising order"),
        ("linear: [0.4, 0.5, 0.6]", "linear: [0.4, 0.4]", "not in rising order"),
        ("linear: [0.4, 0.5, 0.6]", "linear: []", "linear"),
        ("linear: [0.4, 0.5, 0.6]", "linaer: [0.4]", "linaer"),
        ("min_gap: 0.3", "min_gap: 1.5", "min_gap"),
        ("num_samples: 4", "num_samples: 1", "num_samples"),
    ],
)
def test_what_cannot_be_run_is_refused_with_its_line(line: str, changed: str, what: str) -> None:
    text = (
        "pairs:\n  num_prompts: 8\n  num_samples: 4\n  min_gap: 0.3\n  max_pairs: 8\n"
        "selection:\n  num_prompts: 8\n  weights:\n    linear: [0.4, 0.5, 0.6]\n"
        "sweep: {num_prompts: 8, num_steps: 3}\nnum_prompts: 8\n"
    )
    load_text(text, StudyRecipe, "study.yaml")
    assert line in text
    with pytest.raises(DeclarationError) as caught:
        load_text(text.replace(line, changed), StudyRecipe, "study.yaml")
    number = next(n for n, each in enumerate(text.splitlines(), start=1) if line in each)
    assert f"study.yaml:{number}" in caught.value.where
    assert what in f"{caught.value.what} {caught.value.where}"
