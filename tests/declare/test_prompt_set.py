"""Files of prompts: what is read, how prompts are drawn, and which files are rejected."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from personalized_soups.declare.prompt_set import PromptSet, StudyPrompt, load_prompt_set
from personalized_soups.declare.shipped import shipped_recipe
from personalized_soups.errors import InputError


def line(prompt: str = "How do I clean a kettle?", **changes: str) -> str:
    return json.dumps({"prompt": prompt, "kind": "how-to", "subject": "kettles", "split": "train", **changes})


def written(tmp_path: Path, *lines: str) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_the_shipped_prompts_are_balanced_and_no_subject_is_in_two_splits() -> None:
    entries = load_prompt_set(shipped_recipe("prompts/smollm2.jsonl")).entries
    assert Counter(entry.split for entry in entries) == {"train": 180, "validation": 40, "test": 80}
    kinds = ("how-to", "explain", "why", "advice", "list", "opinion")
    assert Counter(entry.kind for entry in entries) == dict.fromkeys(kinds, 50)
    assert len({entry.prompt.lower() for entry in entries}) == 300
    by_split = {
        split: {entry.subject for entry in entries if entry.split == split} for split in ("train", "validation", "test")
    }
    assert sum(map(len, by_split.values())) == len(set().union(*by_split.values()))
    assert all(len(entry.prompt.split()) <= 20 for entry in entries)


def test_a_draw_is_balanced_over_kinds_and_begins_like_a_shorter_draw() -> None:
    prompts = load_prompt_set(shipped_recipe("prompts/smollm2.jsonl"))
    kinds = {entry.prompt: entry.kind for entry in prompts.entries}
    splits = {entry.prompt: entry.split for entry in prompts.entries}
    drawn = prompts.draw("train", 96, seed=0)
    assert Counter(kinds[prompt] for prompt in drawn) == dict.fromkeys(kinds.values(), 16)
    assert {splits[prompt] for prompt in drawn} == {"train"}
    assert len(set(drawn)) == 96
    assert prompts.draw("train", 12, seed=0) == drawn[:12]
    assert prompts.draw("train", 96, seed=1) != drawn
    assert sorted(prompts.draw("test", 80, seed=0)) == sorted(prompts.draw("test", 80, seed=1))


def test_kinds_that_run_out_leave_their_turns_to_the_others(tmp_path: Path) -> None:
    entries = [StudyPrompt(prompt=f"why {n}?", kind="why", subject="x", split="test") for n in range(5)]
    entries.append(StudyPrompt(prompt="list", kind="list", subject="x", split="test"))
    drawn = PromptSet(tmp_path, tuple(entries)).draw("test", 4, seed=0)
    assert Counter(prompt.split()[0] for prompt in drawn) == {"why": 3, "list": 1}


def test_more_prompts_than_the_split_has_are_refused() -> None:
    prompts = load_prompt_set(shipped_recipe("prompts/smollm2.jsonl"))
    with pytest.raises(InputError, match=r"needs 41 prompts of the split 'validation', but the file has 40"):
        prompts.draw("validation", 41, seed=0)


@pytest.mark.parametrize(
    ("second", "what", "where"),
    [
        ("not json", "not a JSON object", ":2"),
        ('["a list"]', "not a JSON object", ":2"),
        (line("  how do I CLEAN a kettle? "), "is also in line 1", ":2"),
        (line("What is tea?", split="test"), "has the split 'test' here, but 'train' in line 1", ":2"),
        (line("What is tea?", subject="Kettles ", split="test"), "but 'train' in line 1", ":2"),
        (line("What is tea?", split="seen"), "seen", ":2: split"),
        (line("What is tea?", colour="red"), "colour", ":2: colour"),
        (line("   "), "prompt", ":2: prompt"),
        (json.dumps({"prompt": "What is tea?", "kind": "why", "split": "train"}), "subject", ":2"),
    ],
)
def test_a_wrong_line_is_refused_with_its_number(tmp_path: Path, second: str, what: str, where: str) -> None:
    path = written(tmp_path, line(), second)
    with pytest.raises(InputError) as caught:
        load_prompt_set(path)
    assert what in str(caught.value)
    assert caught.value.where.startswith(f"{path}{where}")


def test_an_empty_file_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no prompts"):
        load_prompt_set(written(tmp_path, "", "  "))
    with pytest.raises(InputError, match="does not exist"):
        load_prompt_set(tmp_path / "absent.jsonl")
