"""Grade answers with the scorers that label pairs, with held-out judges, and with a gate against broken answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from personalized_soups.declare.dimension import AnyScorer, Catalogue
from personalized_soups.evaluation.scores import Graded, grade


class Gate(Protocol):
    """Decides which answers are valid, in addition to the scorers: for example, which answers are fluent."""

    def valid(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[bool]:
        """Return whether each answer is valid. `prompts` has the prompt of each answer."""
        ...


class Judge(Protocol):
    """Scores answers towards every side by another measure than the scorers that label pairs."""

    def toward(self, prompts: Sequence[str], answers: Sequence[str]) -> Sequence[Mapping[str, float]]:
        """Return the score in [0, 1] of each answer towards each side. `prompts` has the prompt of each answer."""
        ...


class ScorerJudge:
    """Judges by one scorer for each dimension.

    Args:
        catalogue: the sides.
        judges: the scorer of each dimension.
    """

    def __init__(self, catalogue: Catalogue, judges: Mapping[str, AnyScorer]) -> None:
        dimensions = {
            name: dimension.replaced(
                scorer=judges[name],
                sides={side: declared.replaced(scorer=None) for side, declared in dimension.sides.items()},
            )
            for name, dimension in catalogue.dimensions.items()
        }
        self._catalogue = catalogue.replaced(dimensions=dimensions)

    def toward(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Mapping[str, float]]:
        """Return the scores of each answer. An answer that a judge calls invalid has the score 0."""
        return [entry.toward for entry in grade(prompts, answers, self._catalogue, list(self._catalogue.sides))]


@dataclass(frozen=True, slots=True)
class Grader:
    """Grades answers towards every side of a catalogue.

    Attributes:
        catalogue: the sides, with the scorers that label pairs.
        judge: the held-out judges, or None.
        gate: rejects answers that no scorer should count. None leaves validity to the scorers.
    """

    catalogue: Catalogue
    judge: Judge | None = None
    gate: Gate | None = None

    def graded(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Graded]:
        """Grade the answers of one model. An answer that the gate rejects is invalid, and all its scores are 0.

        Raises:
            ValueError: if there are not as many answers as prompts.
        """
        sides = list(self.catalogue.sides)
        graded = grade(prompts, answers, self.catalogue, sides)
        passed = [True] * len(graded) if self.gate is None else self.gate.valid(prompts, answers)
        judged = None if self.judge is None else self.judge.toward(prompts, answers)
        return [
            _gated(entry, is_valid=entry.valid and bool(passed[at]), judged={} if judged is None else judged[at])
            for at, entry in enumerate(graded)
        ]


def _gated(entry: Graded, *, is_valid: bool, judged: Mapping[str, float]) -> Graded:
    if is_valid:
        return Graded(entry.prompt, entry.answer, valid=True, toward=entry.toward, judged=judged)
    return Graded(
        entry.prompt,
        entry.answer,
        valid=False,
        toward=dict.fromkeys(entry.toward, 0.0),
        judged=dict.fromkeys(judged, 0.0),
    )
