"""Which prompts of a file a step uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalized_soups.declare.prompt_set import load_prompt_set
from personalized_soups.declare.run_steps import AnswersStep
from personalized_soups.declare.shipped import recipes_folder
from personalized_soups.errors import InputError
from personalized_soups.studies.pipeline.prompts import prompts_of

FILE = recipes_folder() / "prompts" / "smollm2.jsonl"


def step(*, skip: int = 0, number: int | None = None, split: str | None = None) -> AnswersStep:
    return AnswersStep.model_validate(
        {"kind": "answers", "prompts": "p", "skip_prompts": skip, "num_prompts": number, "split": split}
    )


def test_two_parts_of_a_split_share_no_prompt_and_no_other_split_is_in_them() -> None:
    declared = load_prompt_set(FILE)
    first, rest = prompts_of(FILE, step(number=96, split="train")), prompts_of(FILE, step(skip=96, split="train"))
    assert len(first) == 96
    assert sorted(first + rest) == sorted(entry.prompt for entry in declared.entries if entry.split == "train")
    kinds = {entry.prompt: entry.kind for entry in declared.entries}
    assert len({kinds[prompt] for prompt in first[:6]}) == 6  # every kind is among the first


def test_prompts_of_a_plain_file_keep_their_order(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("a\nb\nc\n")
    assert prompts_of(path, step()) == ["a", "b", "c"]
    assert prompts_of(path, step(skip=1, number=1)) == ["b"]
    for wrong in (step(number=4), step(skip=3), step(skip=2, number=2)):
        with pytest.raises(InputError, match="but there are 3"):
            prompts_of(path, wrong)
