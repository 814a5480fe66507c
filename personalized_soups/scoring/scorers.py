"""Scorers, which rate where an answer lies between the two ends of a dimension, and whether the answer is valid.

A scorer is any function `(prompt, answer) -> Scored`. The built-in scorers need no model: they count marker phrases,
words or syllables. A classifier is trained on texts of both ends. A catalogue can name other scorers as
`package.module:function`, or by the name under which an installed package provides them. Python code can pass a
function for the name of a side or dimension.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, assert_never

from personalized_soups.declare.declared import Declared, KeyPath
from personalized_soups.declare.dimension import (
    AnyScorer,
    Catalogue,
    ClassifierScorer,
    LengthScorer,
    MarkersScorer,
    PluginScorer,
    PythonScorer,
    ReadabilityScorer,
)
from personalized_soups.errors import DeclarationError, choose_from
from personalized_soups.scoring.plugins import load_plugin
from personalized_soups.scoring.readability import grade

if TYPE_CHECKING:
    from personalized_soups.scoring.classifiers.classifier import Classifier

_WORD = re.compile(r"[^\W_]+(?:['\u2019\-][^\W_]+)*")


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one answer.

    Args:
        value: 0 at the low end of the dimension, 1 at the high end.
        valid: whether the answer is well formed and answers its prompt. An invalid answer fits no side.

    Example:
        >>> Scored(value=0.25, valid=True).toward("low")
        0.75
        >>> Scored(value=0.25, valid=False).toward("low")
        0.0
    """

    value: float
    valid: bool

    def toward(self, end: Literal["low", "high"]) -> float:
        """Return how well the answer fits the side at `end`, in [0, 1]. The result is 0 for an invalid answer."""
        if not self.valid:
            return 0.0
        return self.value if end == "high" else 1.0 - self.value


class Scorer(Protocol):
    """The type of a scorer: any function with this signature.

    Example:
        >>> def exclamations(prompt: str, answer: str) -> Scored:
        ...     return Scored(value=min(1.0, answer.count("!") / 4), valid=bool(answer))
        >>> scorer: Scorer = exclamations
        >>> scorer("How do I clean a lamp?", "Dust it!").value
        0.25
    """

    def __call__(self, prompt: str, answer: str, /) -> Scored:
        """Return the score of `answer`, which is an answer to `prompt`."""
        ...


def scorer_of(catalogue: Catalogue, side: str, *, scorers: Mapping[str, Scorer] | None = None) -> Scorer:
    """Return the side's own scorer if it has one, else the scorer of its dimension.

    Args:
        catalogue: the catalogue that declares the side and its scorer.
        side: the side's name.
        scorers: functions by the name of a side or dimension. A function replaces the scorer that the catalogue
            declares for the name.

    Raises:
        DeclarationError: if the side or a name in `scorers` is not in the catalogue, if the side has no scorer, or if
            the scorer cannot be imported.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> scorer_of(catalogue, "concise")("How do I clean a lamp?", "Dust it.").toward("low")
        1.0
    """
    scorers = scorers or {}
    _check_names(scorers, catalogue)
    dimension, declared = catalogue.side(side)
    if side in scorers:
        return _checked(scorers[side], f"scorers[{side!r}]", where=f"scorers[{side!r}]")
    if dimension in scorers and declared.scorer is None:
        return _checked(scorers[dimension], f"scorers[{dimension!r}]", where=f"scorers[{dimension!r}]")
    return declared_scorer(catalogue.scorer_of(side), owner=catalogue, key=_key(catalogue, side))


def declared_scorer(spec: AnyScorer, *, owner: Declared, key: KeyPath = ("scorer",)) -> Scorer:
    """Return the scorer that a file declares.

    Args:
        spec: the declaration of the scorer.
        owner: the declaration of the whole file. Relative paths start at its folder.
        key: the path of the scorer's key in the file, for error messages.

    Raises:
        DeclarationError: if the scorer cannot be imported, or a classifier's folder does not exist.
        FileFormatError: if a classifier's files are damaged.
    """
    match spec:
        case MarkersScorer():
            return markers_scorer(high=spec.high, low=spec.low)
        case LengthScorer():
            return length_scorer(low=spec.low, high=spec.high)
        case ReadabilityScorer():
            return readability_scorer(low=spec.low, high=spec.high)
        case PythonScorer():
            return python_scorer(spec.function, where=owner.place(*key, "function"))
        case PluginScorer():
            return plugin_scorer(spec.name, where=owner.place(*key, "name"))
        case ClassifierScorer():
            return classifier_scorer(owner.relative_path(spec.path), where=owner.place(*key, "path"))
        case _:
            assert_never(spec)


def _check_names(scorers: Mapping[str, Scorer], catalogue: Catalogue) -> None:
    known = {*catalogue.sides, *catalogue.dimensions}
    for name in scorers:
        if name not in known:
            raise DeclarationError(
                f"unknown side or dimension {name!r}", where=f"scorers[{name!r}]", mend=choose_from(name, known)
            )


def _key(catalogue: Catalogue, side: str) -> KeyPath:
    """Return the key of the side's own scorer, or else of its dimension's."""
    dimension, declared = catalogue.side(side)
    own = () if declared.scorer is None else ("sides", side)
    return ("dimensions", dimension, *own, "scorer")


def markers_scorer(*, high: Sequence[str], low: Sequence[str]) -> Scorer:
    """Return a scorer that counts marker phrases. The score is num_high / (num_high + num_low).

    The score is 0.5 if the answer contains no marker phrase.
    """
    # One pattern for both ends: "well done" may mark one end and "well" the other.
    marker = _any_of([*high, *low])
    highs = {_plain(phrase) for phrase in high}

    def score(prompt: str, answer: str, /) -> Scored:
        matches = [_plain(phrase) in highs for phrase in marker.findall(answer)]
        return Scored(sum(matches) / len(matches) if matches else 0.5, valid=_has_words(answer))

    return score


def length_scorer(*, low: int, high: int) -> Scorer:
    """Return a scorer that counts words: 0 for at most `low` words, 1 for at least `high` words, linear in between."""

    def score(prompt: str, answer: str, /) -> Scored:
        return Scored(_between(len(_WORD.findall(answer)), low, high), valid=_has_words(answer))

    return score


def readability_scorer(*, low: float, high: float) -> Scorer:
    """Return a scorer of the Flesch-Kincaid grade: 0 up to grade `low`, 1 from grade `high`, linear in between."""

    def score(prompt: str, answer: str, /) -> Scored:
        return Scored(_between(grade(answer), low, high), valid=_has_words(answer))

    return score


def python_scorer(function: str, *, where: str = "scorer: function") -> Scorer:
    """Import the function `package.module:name` and return a scorer that also checks the function's results.

    Raises:
        DeclarationError: if the function cannot be imported. The returned scorer raises the same error if the function
            returns anything other than a Scored with a value in [0, 1].
    """
    module_name, _, name = function.partition(":")
    try:
        imported = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise DeclarationError(
            f"the scorer {function!r} cannot be imported: {error}",
            where=where,
            mend="write the name as package.module:function, and install the package or add its folder to PYTHONPATH",
        ) from error
    return _checked(imported, repr(function), where=where)


def plugin_scorer(name: str, *, where: str = "scorer: name") -> Scorer:
    """Import the function that an installed package provides under `name`, and return a scorer that checks its results.

    Raises:
        DeclarationError: if no package provides the name, if several packages do, or if the function cannot be
            imported. The returned scorer raises the same error if the function returns anything other than a Scored
            with a value in [0, 1].
    """
    return _checked(load_plugin(name, where=where), repr(name), where=where)


def classifier_scorer(classifier: Classifier | Path, *, where: str = "scorer: path") -> Scorer:
    """Return a scorer whose value is the probability of the high class.

    Args:
        classifier: a classifier, or the folder of one. If it reads hidden states, its base is loaded at the first
            answer.
        where: the place in the catalogue that names the folder, for error messages.

    Raises:
        DeclarationError: if the folder does not exist.
        FileFormatError: if the folder holds no classifier, or a file is damaged.
    """
    if isinstance(classifier, Path):
        if not classifier.is_dir():
            raise DeclarationError(
                f"there is no folder {str(classifier)!r}",
                where=where,
                mend="give the folder that psoups scorer train wrote; a relative path starts at the catalogue's folder",
            )
        from personalized_soups.scoring.answer_classifiers import open_answer_classifier

        classifier = open_answer_classifier(classifier)
    opened = classifier

    def score(prompt: str, answer: str, /) -> Scored:
        return Scored(float(opened.values([(prompt, answer)])[0]), valid=_has_words(answer))

    return score


def _checked(function: Callable[[str, str], object], name: str, *, where: str) -> Scorer:
    def score(prompt: str, answer: str, /) -> Scored:
        scored = function(prompt, answer)
        # The function is not part of this package, so it may return anything, regardless of its annotations.
        if not isinstance(scored, Scored) or not 0.0 <= scored.value <= 1.0:
            raise DeclarationError(
                f"the scorer {name} returned {scored!r}, but it must return a Scored with a value in [0, 1]",
                where=where,
                mend="return a personalized_soups.scoring.scorers.Scored, e.g. Scored(value=0.5, valid=True)",
            )
        return scored

    return score


def _any_of(phrases: Sequence[str]) -> re.Pattern[str]:
    """Return a case-insensitive pattern that matches any phrase as whole words. It tries the longest phrase first."""
    longest_first = sorted(phrases, key=len, reverse=True)
    return re.compile("|".join(map(_pattern, longest_first)), re.IGNORECASE)


def _pattern(phrase: str) -> str:
    """Return the pattern of one phrase. A word at its end is a whole word; a sign may touch a word, as in "fun!"."""
    pattern = r"\s+".join(re.escape(word) for word in phrase.split())
    plain = phrase.strip()
    before, after = (r"(?<!\w)" if plain[0].isalnum() else "", r"(?!\w)" if plain[-1].isalnum() else "")
    return f"{before}{pattern}{after}"


def _plain(phrase: str) -> str:
    return " ".join(phrase.lower().split())


def _has_words(answer: str) -> bool:
    return _WORD.search(answer) is not None


def _between(value: float, low: float, high: float) -> float:
    return min(1.0, max(0.0, (value - low) / (high - low)))
