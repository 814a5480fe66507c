"""Which bases and prompts a study refuses before it computes anything."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from personalized_soups.declare.prompt_set import PromptSet, Split, StudyPrompt
from personalized_soups.errors import DeclarationError, InputError
from personalized_soups.generation.loading import load_tokenizer
from personalized_soups.studies import base_checks
from personalized_soups.studies.base_checks import check_base, token_counter
from personalized_soups.studies.study import Study
from personalized_soups.tiny import BASE_FOLDER


def test_the_embedded_base_is_accepted() -> None:
    check_base(Study())


def test_a_base_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(BASE_FOLDER, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").unlink(missing_ok=True)
    with pytest.raises(InputError, match="no chat template") as caught:
        check_base(Study(base=base))
    assert caught.value.where == str(base)


def test_a_prompt_that_leaves_no_room_for_an_answer_is_refused() -> None:
    study = Study()
    count = token_counter(BASE_FOLDER)
    drawn_by: dict[Split, tuple[str, ...]] = {
        "train": study.train_prompts,
        "validation": study.validation_prompts,
        "test": study.test_prompts,
    }
    entries = [
        StudyPrompt(prompt=prompt, kind="how-to", subject=f"{split} {at}", split=split)
        for split, drawn in drawn_by.items()
        for at, prompt in enumerate(drawn)
    ]
    check_base(replace(study, prompts=PromptSet(Path("prompts.jsonl"), tuple(entries))))
    # The context has 512 tokens, an answer takes 200, and the instructions of three sides some more.
    long = "clean the lamp " * 100
    assert count(long) < 512
    entries[-1] = entries[-1].replaced(prompt=long)
    with pytest.raises(InputError, match="the base's context has 512") as caught:
        check_base(replace(study, prompts=PromptSet(Path("prompts.jsonl"), tuple(entries))))
    assert "clean the lamp" in caught.value.where


def test_a_catalogue_with_three_sides_in_a_dimension_needs_a_recipe_that_names_two() -> None:
    from personalized_soups.declare.dimension import Catalogue
    from personalized_soups.declare.loader import load
    from personalized_soups.declare.shipped import shipped_recipe

    catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
    with pytest.raises(DeclarationError, match="'style' has the sides friendly"):
        Study(catalogue=catalogue)
    recipe = Study().recipe.replaced(sides=("elementary", "expert", "unfriendly", "sassy"))
    study = Study(catalogue=catalogue, recipe=recipe)
    assert study.sides == {"expertise": ("elementary", "expert"), "style": ("unfriendly", "sassy")}
    assert study.catalogue.side("sassy")[1] == catalogue.side("sassy")[1]
    assert study.catalogue.instructions(("expert", "sassy")) == " ".join(
        catalogue.side(side)[1].instruction for side in ("expert", "sassy")
    )
    with pytest.raises(DeclarationError, match="unknown side 'sasy'"):
        Study(catalogue=catalogue, recipe=recipe.replaced(sides=("sasy", "unfriendly")))


def test_a_base_of_the_hub_is_downloaded_before_its_fingerprint_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[object] = []
    embedded = load_tokenizer(BASE_FOLDER)
    monkeypatch.setattr(base_checks, "load_base", lambda base, **_: loaded.append(base))
    monkeypatch.setattr(base_checks, "load_tokenizer", lambda base: embedded)
    check_base(Study(base="owner/name"))
    assert loaded == ["owner/name"]
    check_base(Study())
    assert loaded == ["owner/name"]
