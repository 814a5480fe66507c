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


@dataclass(frozen=True, slots=True)
class Grader:
    """Grades answers towards every side of a catalogue.

    Attributes:
        catalogue: the sides, with the scorers that label pairs.
        judges: the catalogue with the held-out judges as scorers, or None without judges.
        gate: rejects answers that no scorer should count. None leaves validity to the scorers.
    """

    catalogue: Catalogue
    judges: Catalogue | None = None
    gate: Gate | None = None

    def graded(self, prompts: Sequence[str], answers: Sequence[str]) -> list[Graded]:
        """Grade the answers of one model. An answer that the gate rejects is invalid, and all its scores are 0.

        Raises:
            ValueError: if there are not as many answers as prompts.
        """
        sides = list(self.catalogue.sides)
        graded = grade(prompts, answers, self.catalogue, sides)
        passed = [True] * len(graded) if self.gate is None else self.gate.valid(prompts, answers)
        judged = [entry.toward for entry in grade(prompts, answers, self.judges, sides)] if self.judges else None
        return [
            _gated(entry, is_valid=entry.valid and bool(passed[at]), judged={} if judged is None else judged[at])
            for at, entry in enumerate(graded)
        ]


def judging_catalogue(catalogue: Catalogue, judges: Mapping[str, AnyScorer]) -> Catalogue:
    """Return the catalogue with the judge of each dimension as the only scorer of its sides."""
    dimensions = {
        name: dimension.replaced(
            scorer=judges[name],
            sides={side: declared.replaced(scorer=None) for side, declared in dimension.sides.items()},
        )
        for name, dimension in catalogue.dimensions.items()
    }
    return catalogue.replaced(dimensions=dimensions)


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
