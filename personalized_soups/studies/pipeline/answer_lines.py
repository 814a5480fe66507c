"""Read the answers of a step: one line for each, with its prompt and what it says about the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

from personalized_soups.files.lines import read_lines

ANSWERS = "answers.jsonl"

Key = TypeVar("Key")
Answered: TypeAlias = tuple[list[str], list[str]]
"""Prompts, and the answer to each."""


def grouped_answers(folder: Path, key: Callable[[Mapping[str, Any]], Key]) -> dict[Key, Answered]:
    """Return the prompts and the answers of each model of a step, in the order of the file.

    Args:
        folder: the folder of the step.
        key: returns the model of a line.
    """
    found: dict[Key, Answered] = {}
    for line in read_lines(folder / ANSWERS):
        prompts, answers = found.setdefault(key(line), ([], []))
        prompts.append(line["prompt"])
        answers.append(line["answer"])
    return found
