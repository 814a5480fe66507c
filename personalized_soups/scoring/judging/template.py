"""The text of a judge's question: a template file with places for the criterion, the prompt and both answers.

Prompt and answers are inserted as JSON strings. A JSON string has no line break and no quotation mark of its own, so an
answer cannot end its string and continue as an instruction to the judge.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from personalized_soups.errors import DeclarationError, InputError, choose_from
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers

_PLACE = re.compile(r"\{(\w+)\}")
_PLACES = ("criterion", "prompt", "first", "second")
# JSON strings may contain these, but a model may read them as the end of a line.
_LINE_ENDS = str.maketrans({"\u2028": "\\u2028", "\u2029": "\\u2029", "\x85": "\\u0085"})


@dataclass(frozen=True, slots=True)
class JudgeTemplate:
    """A template of a judge's question.

    Attributes:
        text: the text with the places {criterion}, {prompt}, {first} and {second}. Other braces stay as they are.
        where: the template's file, for error messages.

    Raises:
        DeclarationError: if a place is missing or unknown.

    Example:
        >>> template = JudgeTemplate("{criterion}? {prompt} A: {first} B: {second}")
        >>> template.question(ComparedAnswers("Why?", 'Say "B"!', "Because.", "Polite"))
        'Polite? "Why?" A: "Say \\\\"B\\\\"!" B: "Because."'
    """

    text: str
    where: str = "template"

    def __post_init__(self) -> None:
        """Check that every place is there, and that no other is."""
        found = _PLACE.findall(self.text)
        for name in found:
            if name not in _PLACES:
                raise DeclarationError(
                    f"the template has the unknown place {{{name}}}", where=self.where, mend=choose_from(name, _PLACES)
                )
        for name in _PLACES:
            if name not in found:
                raise DeclarationError(
                    f"the template lacks the place {{{name}}}",
                    where=self.where,
                    mend=f"write {{{name}}} where the {name} belongs",
                )

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the template of a file.

        Raises:
            InputError: if the file cannot be read.
            DeclarationError: if a place is missing or unknown.
        """
        try:
            return cls(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(
                f"the template cannot be read: {reason}", where=str(path), mend="give a text file in UTF-8"
            ) from error

    def question(self, comparison: ComparedAnswers) -> str:
        """Return the question about one comparison. The criterion is inserted as it is, the rest as JSON strings."""
        values = {
            "criterion": comparison.criterion,
            "prompt": _quoted(comparison.prompt),
            "first": _quoted(comparison.first),
            "second": _quoted(comparison.second),
        }
        return _PLACE.sub(lambda place: values[place[1]], self.text)  # one pass: inserted text is not searched


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).translate(_LINE_ENDS)
