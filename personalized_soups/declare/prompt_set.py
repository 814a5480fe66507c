"""`PromptSet`: prompts with their kind, subject and split, from a JSON Lines file.

No subject is in two splits, so a model that was trained on one split has not seen the subjects of the others.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from personalized_soups.declare.declared import Declared
from personalized_soups.declare.loader import load_data, read_text
from personalized_soups.errors import InputError

Split: TypeAlias = Literal["train", "validation", "test"]

_MEND = 'write {"prompt": "...", "kind": "...", "subject": "...", "split": "train"} on every line'


class StudyPrompt(Declared):
    """One prompt of a study."""

    prompt: Annotated[str, Field(pattern=r"\S")] = Field(description="The text of the prompt.")
    kind: Annotated[str, Field(pattern=r"\S")] = Field(description="The kind of the prompt, such as `explain`.")
    subject: Annotated[str, Field(pattern=r"\S")] = Field(description="What the prompt is about, such as `bread`.")
    split: Split = Field(description="`train`, `validation` or `test`.")


@dataclass(frozen=True, slots=True)
class PromptSet:
    """The prompts of a study.

    Attributes:
        path: the file of the prompts.
        entries: the prompts, in the order of the file.
    """

    path: Path
    entries: tuple[StudyPrompt, ...]

    def draw(self, split: Split, count: int, seed: int) -> tuple[str, ...]:
        """Return `count` prompts of one split at random, with the same number of each kind, as far as there are enough.

        The first prompts of a longer draw with the same seed are those of a shorter draw.

        Raises:
            InputError: if the split has fewer than `count` prompts.
        """
        own = [entry for entry in self.entries if entry.split == split]
        if count > len(own):
            raise InputError(
                f"the study needs {count} prompts of the split {split!r}, but the file has {len(own)}",
                where=str(self.path),
                mend="add prompts to the file, or lower the number of prompts in the recipe",
            )
        shuffled = random.Random(f"prompts/{split}/{seed}").sample(own, len(own))
        # A prompt's turn is its number among the prompts of its kind. Taking all first turns, then all second turns,
        # and so on, balances the kinds. The sort is stable, so prompts with the same turn stay shuffled.
        seen: dict[str, int] = {}
        turns = []
        for entry in shuffled:
            seen[entry.kind] = turn = seen.get(entry.kind, 0) + 1
            turns.append((turn, entry.prompt))
        return tuple(prompt for _, prompt in sorted(turns, key=lambda pair: pair[0])[:count])


def load_prompt_set(path: Path) -> PromptSet:
    """Read a file of prompts. Each line is a JSON object with `prompt`, `kind`, `subject` and `split`.

    Raises:
        InputError: if the file cannot be read or has no prompts, if a line is not such an object, if a prompt occurs
            twice, or if a subject is in two splits. The error names the file and the line.
    """
    entries: list[tuple[int, StudyPrompt]] = []
    # Not splitlines, which also splits at characters that JSON strings may contain.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            entries.append((number, _entry(line, f"{path}:{number}")))
    if not entries:
        raise InputError("the file holds no prompts", where=str(path), mend=_MEND)
    _check_distinct(entries, path)
    return PromptSet(path, tuple(entry for _, entry in entries))


def _entry(line: str, where: str) -> StudyPrompt:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise InputError("the line is not a JSON object", where=where, mend=_MEND)
    return load_data(row, StudyPrompt, where)


def _check_distinct(entries: Sequence[tuple[int, StudyPrompt]], path: Path) -> None:
    lines: dict[str, int] = {}
    homes: dict[str, tuple[int, Split]] = {}
    for number, entry in entries:
        # Prompts and subjects that differ only in case or in spaces are the same.
        first = lines.setdefault(_plain(entry.prompt), number)
        if first != number:
            raise InputError(
                f"the prompt {entry.prompt!r} is also in line {first}",
                where=f"{path}:{number}",
                mend="remove one of the two lines",
            )
        line, split = homes.setdefault(_plain(entry.subject), (number, entry.split))
        if split != entry.split:
            raise InputError(
                f"the subject {entry.subject!r} has the split {entry.split!r} here, but {split!r} in line {line}",
                where=f"{path}:{number}",
                mend="give all prompts of a subject the same split, so that test subjects stay unseen in training",
            )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
