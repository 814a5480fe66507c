"""Scorers: how far one answer lies towards the high end of a dimension, in [0, 1], and whether it is an answer at all.

The built-in kinds need no model: they count markers, words, or syllables. A scorer of kind `python` is any function
`(prompt, answer) -> Scored`; a catalogue names it as `package.module:function`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, assert_never

from personalized_soups.declare.dimension import (
    Catalogue,
    LengthScorer,
    MarkersScorer,
    PythonScorer,
    ReadabilityScorer,
)
from personalized_soups.errors import DeclarationError

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")
_SENTENCE_END = re.compile(r"[.!?]+(?=\s|$)")
_VOWEL_GROUP = re.compile(r"[aeiouy]+")


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer's score.

    Args:
        value: 0 at the low end of the dimension, 1 at the high end.
        valid: whether the text is a well-formed answer to its prompt; an invalid answer suits no side.
    """

    value: float
    valid: bool

    def toward(self, end: Literal["low", "high"]) -> float:
        """Return how well the answer suits a side at `end`: in [0, 1], 0 for an invalid answer."""
        if not self.valid:
            return 0.0
        return self.value if end == "high" else 1.0 - self.value


class Scorer(Protocol):
    """Scores one answer; anything that can be called like this is a scorer."""

    def __call__(self, prompt: str, answer: str, /) -> Scored:
        """Return the score of `answer` as a reply to `prompt`."""
        ...


def scorer_of(catalogue: Catalogue, side: str) -> Scorer:
    """Return what scores the side: its own scorer where it has one, else its dimension's.

    Raises:
        DeclarationError: if the side is not known, nothing scores it, or its Python function is not there.
    """
    spec = catalogue.scorer_of(side)
    match spec:
        case MarkersScorer():
            return markers_scorer(high=spec.high, low=spec.low)
        case LengthScorer():
            return length_scorer(low=spec.low, high=spec.high)
        case ReadabilityScorer():
            return readability_scorer(low=spec.low, high=spec.high)
        case PythonScorer():
            return python_scorer(spec.function)
        case _:
            assert_never(spec)


def markers_scorer(*, high: Sequence[str], low: Sequence[str]) -> Scorer:
    """Return a scorer that counts words and phrases: high / (high + low), 0.5 where none occurs."""
    # One pattern for both ends: "well done" may mark one end and "well" the other.
    marker = _any_of([*high, *low])
    highs = {_plain(phrase) for phrase in high}

    def score(prompt: str, answer: str, /) -> Scored:
        found = [_plain(phrase) in highs for phrase in marker.findall(answer)]
        return Scored(sum(found) / len(found) if found else 0.5, valid=_is_said(answer))

    return score


def length_scorer(*, low: int, high: int) -> Scorer:
    """Return a scorer that counts words: 0 at `low` words and below, 1 at `high` and above, linear between."""

    def score(prompt: str, answer: str, /) -> Scored:
        return Scored(_between(len(_WORD.findall(answer)), low, high), valid=_is_said(answer))

    return score


def readability_scorer(*, low: float, high: float) -> Scorer:
    """Return a scorer of the Flesch-Kincaid grade: 0 at grade `low` and below, 1 at `high` and above."""

    def score(prompt: str, answer: str, /) -> Scored:
        return Scored(_between(grade(answer), low, high), valid=_is_said(answer))

    return score


def python_scorer(function: str) -> Scorer:
    """Return the function `package.module:name`, wrapped so that a wrong result is an error that names it.

    Raises:
        DeclarationError: if the module or the name is not there, at once; if the function returns no Scored with a
            value in [0, 1], at the call.
    """
    module_name, _, name = function.partition(":")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as fault:
        raise DeclarationError(
            f"the scorer {function!r} can't be imported: {fault}",
            where="scorer: function",
            mend="write it as package.module:function, with the package installed or its folder in PYTHONPATH",
        ) from fault

    def score(prompt: str, answer: str, /) -> Scored:
        scored = found(prompt, answer)
        if not isinstance(scored, Scored) or not 0.0 <= scored.value <= 1.0:
            raise DeclarationError(
                f"the scorer {function!r} returned {scored!r}, expected a Scored with a value in [0, 1]",
                where=function,
                mend="return personalized_soups.scoring.scorers.Scored(value, valid)",
            )
        return scored

    return score


def grade(text: str) -> float:
    """Return the Flesch-Kincaid grade of `text`: .39 words per sentence + 11.8 syllables per word - 15.59.

    A syllable is a group of vowels, without a silent final e; a text without a word has grade 0.
    Source: Kincaid et al. 1975.
    """
    words = _WORD.findall(text.lower())
    if not words:
        return 0.0
    num_sentences = max(1, len(_SENTENCE_END.findall(text)))
    num_syllables = sum(_syllables(word) for word in words)
    return 0.39 * len(words) / num_sentences + 11.8 * num_syllables / len(words) - 15.59


def _syllables(word: str) -> int:
    groups = len(_VOWEL_GROUP.findall(word))
    silent = word.endswith("e") and not word.endswith(("le", "ee", "ye")) and groups > 1
    return max(1, groups - silent)


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a pattern of any phrase, as whole words, in any case; the longer phrase wins where two begin alike."""
    longest_first = sorted(phrases, key=len, reverse=True)
    # Lookarounds, not \b: a marker may begin or end with a sign, as "wow!" does.
    alternatives = "|".join(r"\s+".join(re.escape(word) for word in phrase.split()) for phrase in longest_first)
    return re.compile(rf"(?<!\w)(?:{alternatives})(?!\w)", re.IGNORECASE)


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _is_said(answer: str) -> bool:
    return _WORD.search(answer) is not None


def _between(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
