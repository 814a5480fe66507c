"""Score an answer in every dimension that has a scorer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from personalized_soups.declare.dimension import Catalogue, Dimension
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.scorers import Scorer, scorer_of


@dataclass(frozen=True, slots=True)
class Scale:
    """The scale of one dimension, from 0 at the low end to 1 at the high end.

    Attributes:
        dimension: the dimension's name.
        low: the name of the low end: its side, or `not SIDE` if only the high end has a side.
        high: the name of the high end: its side, or `not SIDE` if only the low end has a side.
        scorer: the function that scores an answer.
    """

    dimension: str
    low: str
    high: str
    scorer: Scorer


class Scales:
    """The scales of all dimensions that have a scorer.

    Args:
        catalogue: the catalogue that declares the dimensions. If None, there are no scales.
        scorers: functions that replace scorers of the catalogue, by the name of a dimension or side. See `scorer_of`.

    Raises:
        DeclarationError: if a scorer's function cannot be imported.
    """

    def __init__(self, catalogue: Catalogue | None, *, scorers: Mapping[str, Scorer] | None = None) -> None:
        dimensions = {} if catalogue is None else catalogue.dimensions
        self._scales = [
            _scale(catalogue, name, dimension, scorers)
            for name, dimension in dimensions.items()
            if catalogue is not None and (dimension.scorer is not None or name in (scorers or {}))
        ]

    @property
    def dimensions(self) -> frozenset[str]:
        """The names of the dimensions with a scale."""
        return frozenset(scale.dimension for scale in self._scales)

    def scores(self, prompt: str, answer: str) -> list[dict[str, Any]]:
        """Return one dict per dimension, with its two ends and the score of the answer.

        The score is 0 at the low end and 1 at the high end.

        Raises:
            DeclarationError: if a scorer returns anything other than a Scored with a value in [0, 1].
        """
        scores: list[dict[str, Any]] = []
        for scale in self._scales:
            scored = scale.scorer(prompt, answer)
            scores.append(
                {
                    "dimension": scale.dimension,
                    "low": scale.low,
                    "high": scale.high,
                    "value": scored.value,
                    "is_valid": scored.valid,
                }
            )
        return scores


def _scale(catalogue: Catalogue, name: str, dimension: Dimension, scorers: Mapping[str, Scorer] | None) -> Scale:
    own = {side for side in dimension.sides if side in (scorers or {})}
    ends = {
        side.end: label for label, side in reversed(dimension.sides.items()) if side.scorer is None and label not in own
    }
    if not ends:
        raise DeclarationError(
            f"no side uses the scorer of the dimension {name!r}, because every side has its own scorer",
            where=f"dimensions.{name}",
            mend="remove the dimension's scorer, or remove the own scorer of one side",
        )
    some_side = next(iter(ends.values()))
    return Scale(
        name,
        ends.get("low", f"not {some_side}"),
        ends.get("high", f"not {some_side}"),
        scorer_of(catalogue, some_side, scorers=scorers),
    )
