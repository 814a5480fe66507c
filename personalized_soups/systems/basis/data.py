"""Read the comparisons of many users from JSON lines."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from personalized_soups.declare.declared import Declared, refusal
from personalized_soups.declare.evidence import Choice, Text
from personalized_soups.declare.loader import load_data
from personalized_soups.errors import InputError
from personalized_soups.files.strict_json import parse_json
from personalized_soups.scoring.base_rewards import TextItem
from personalized_soups.scoring.item_features import ItemFeatures
from personalized_soups.systems.preference_models import Comparisons

_MEND = 'write {"user": "ann", "prompt": "...", "a": "...", "b": "...", "choice": "a"} on every line'


class UserComparison(Declared):
    """One line of the file: which of two answers to a prompt a user prefers.

    Example:
        >>> line = UserComparison(user="ann", prompt="How do I clean a lamp?", a="Dust it.", b="Wipe it.", choice="tie")
        >>> line.preference
        0.5
    """

    user: Text = Field(description="The user's id.")
    prompt: Text = Field(description="The prompt that both answers belong to.")
    a: Text = Field(description="The first answer.")
    b: Text = Field(description="The second answer.")
    choice: Choice | None = Field(default=None, description="The better answer: a, b, tie or skip.")
    label: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None, description="The probability that a is better, instead of a choice."
    )

    @model_validator(mode="after")
    def _check(self) -> UserComparison:
        if (self.choice is None) == (self.label is None):
            raise refusal(
                "exactly one of `choice` and `label` must be given", mend='write "choice": "a"', key=("choice",)
            )
        if self.a == self.b:
            raise refusal("both answers are the same text", mend="write two different answers", key=("b",))
        return self

    @property
    def preference(self) -> float | None:
        """The probability that `a` is better, or None if the user skipped the pair."""
        if self.choice is None:
            return self.label
        return {"a": 1.0, "b": 0.0, "tie": 0.5, "skip": None}[self.choice]


@dataclass(frozen=True, slots=True)
class TextComparisons:
    """The comparisons of a file, without skipped pairs.

    Attributes:
        items: the different answers with their prompts.
        a: the index of the first answer of each pair in `items`.
        b: the index of the second answer.
        labels: the probability that `a` is better.
        users: the number of the user, from 0 in the order of the file.
        num_users: the number of different users.
    """

    items: tuple[TextItem, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    labels: tuple[float, ...]
    users: tuple[int, ...]
    num_users: int

    def comparisons(self, features: ItemFeatures[TextItem]) -> Comparisons:
        """Return the comparisons with the features of the answers."""
        return Comparisons(features.features(self.items), self.a, self.b, self.labels, self.users)


def read_comparisons(path: Path) -> TextComparisons:
    """Read a file of JSON lines with the keys of `UserComparison`.

    Raises:
        InputError: if the file cannot be read or holds no comparison.
        DeclarationError: if a line has unknown, missing or wrong keys.
        FileFormatError: if a line is not JSON.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"the comparisons can't be read: {error.strerror}", where=str(path), mend="check the path"
        ) from error
    items: dict[TextItem, int] = {}
    users: dict[str, int] = {}
    rows: list[tuple[int, int, float, int]] = []
    for number, line in enumerate(content.removeprefix(codecs.BOM_UTF8).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = Path(f"{path}:{number}")
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise InputError("the line is not a JSON object", where=str(where), mend=_MEND)
        entry = load_data(row, UserComparison, str(where))
        if entry.preference is None:
            continue
        a, b = (items.setdefault(TextItem(entry.prompt, answer), len(items)) for answer in (entry.a, entry.b))
        rows.append((a, b, entry.preference, users.setdefault(entry.user, len(users))))
    if not rows:
        raise InputError("the file holds no comparisons", where=str(path), mend=_MEND)
    first, second, labels, numbers = zip(*rows, strict=True)
    return TextComparisons(tuple(items), first, second, labels, numbers, len(users))
