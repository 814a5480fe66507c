"""Which study the options of `psoups quickstart` make."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from personalized_soups.cli.study.quickstart_study import StudyOptions
from personalized_soups.declare.prompt_set import PromptSet
from personalized_soups.errors import DeclarationError, InputError, UsageError
from personalized_soups.studies.prompt_sources import TinyPrompts
from personalized_soups.studies.study import Study
from personalized_soups.tiny import BASE_FOLDER

TINY = StudyOptions(
    base="tiny",
    basis="free",
    recipe=None,
    train_recipe=None,
    dimensions=None,
    prompts=None,
    full=False,
    seed=3,
    workers=2,
    device="cpu",
)


@pytest.mark.parametrize("basis", ["free", "shared"])
def test_the_embedded_base_has_the_study_that_python_has_by_default(basis: str) -> None:
    found = replace(TINY, basis=basis).study()
    expected = Study(seed=3, basis="free" if basis == "free" else "shared", num_workers=2, device="cpu")
    assert found.settings() == expected.settings()
    assert isinstance(found.prompts, TinyPrompts)


def test_a_base_without_a_name_has_recipes_and_prompts_of_smollm2() -> None:
    found = replace(TINY, base=str(BASE_FOLDER)).study()
    assert found.base == BASE_FOLDER
    assert isinstance(found.prompts, PromptSet)
    assert len(found.train_prompts) == found.recipe.pairs.num_prompts == 96
    assert set(found.recipe.systems) == {"preference_prompting", "single_expert", "soup_prompting"}
    assert set(found.catalogue.sides) == {
        *("elementary", "expert", "concise", "informative", "friendly", "unfriendly"),
    }
    assert found.training is not None
    assert found.training.dpo.max_length == 512
    full = replace(TINY, base=str(BASE_FOLDER), full=True).study()
    assert len({*full.train_prompts, *full.validation_prompts, *full.test_prompts}) >= 180


def test_files_replace_those_of_the_base(tmp_path: Path) -> None:
    recipe, prompts = tmp_path / "recipe.yaml", tmp_path / "prompts.jsonl"
    recipe.write_text(
        "pairs: {num_prompts: 1, num_samples: 2, min_gap: 0.5, max_pairs: 3}\n"
        "selection: {num_prompts: 1, weights: {linear: [0.5]}}\nnum_prompts: 1\n"
    )
    prompts.write_text(
        "".join(
            f'{{"prompt": "{split}?", "kind": "why", "subject": "{split}", "split": "{split}"}}\n'
            for split in ("train", "validation", "test")
        )
    )
    found = replace(TINY, recipe=recipe, prompts=prompts, basis="shared").study()
    assert found.recipe.pairs.max_pairs == 3
    assert (found.train_prompts, found.validation_prompts, found.test_prompts) == (
        ("train?",),
        ("validation?",),
        ("test?",),
    )
    assert found.training is not None
    assert found.training.basis == "shared"
    prompts.write_text("nonsense\n")
    with pytest.raises(InputError, match="not a JSON object"):
        replace(TINY, prompts=prompts).study()


def test_a_judge_that_labels_the_pairs_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    scorer = '{kind: python, function: "personalized_soups.tiny.scorers:%s"}'
    names = ("expertise", "informativeness", "style")
    recipe.write_text(
        "pairs: {num_prompts: 1, num_samples: 2, min_gap: 0.5, max_pairs: 3}\n"
        "selection: {num_prompts: 1, weights: {linear: [0.5]}}\nnum_prompts: 1\njudges:\n"
        + "".join(f"  {name}: {scorer % name}\n" for name in names)
    )
    with pytest.raises(DeclarationError, match="labels the pairs of 'elementary'") as caught:
        replace(TINY, recipe=recipe).study()
    assert f"{recipe}:5" in caught.value.where


def test_an_unknown_basis_and_a_missing_full_study_are_refused() -> None:
    with pytest.raises(UsageError, match="unknown basis 'fixed'"):
        replace(TINY, basis="fixed").study()
    with pytest.raises(UsageError, match="'tiny' has no full study") as caught:
        replace(TINY, full=True).study()
    assert caught.value.where == "--full"
