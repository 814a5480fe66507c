"""How far an answer lies between the two ends of each dimension, where the catalogue says how that is seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from personalized_soups.declare.dimension import Catalogue, Dimension
from personalized_soups.errors import DeclarationError
from personalized_soups.scoring.scorers import Scorer, scorer_of


@dataclass(frozen=True, slots=True)
class Scale:
    """One dimension's: `low` and `high` are the sides at its ends."""

    dimension: str
    low: str
    high: str
    scorer: Scorer


class Scales:
    """All dimensions that have a scorer of their own.

    Args:
        catalogue: of the dimensions; None has none.

    Raises:
        DeclarationError: if a scorer's Python function is not there.
    """

    def __init__(self, catalogue: Catalogue | None) -> None:
        declared = {} if catalogue is None else catalogue.dimensions
        self._scales = [
            _scale(catalogue, name, dimension)
            for name, dimension in declared.items()
            if catalogue is not None and dimension.scorer is not None
        ]

    @property
    def dimensions(self) -> frozenset[str]:
        """The dimensions that are scored."""
        return frozenset(scale.dimension for scale in self._scales)

    def scores(self, prompt: str, answer: str) -> list[dict[str, Any]]:
        """Return an answer's score in each dimension: 0 at the low end, 1 at the high end.

        Raises:
            DeclarationError: if a scorer gives no score.
        """
        found: list[dict[str, Any]] = []
        for scale in self._scales:
            scored = scale.scorer(prompt, answer)
            found.append(
                {
                    "dimension": scale.dimension,
                    "low": scale.low,
                    "high": scale.high,
                    "value": scored.value,
                    "is_valid": scored.valid,
                }
            )
        return found


def _scale(catalogue: Catalogue, name: str, dimension: Dimension) -> Scale:
    ends = {side.end: label for label, side in reversed(dimension.sides.items()) if side.scorer is None}
    if not ends:
        raise DeclarationError(
            f"the dimension {name!r} has a scorer that no side is scored by",
            where=f"dimensions.{name}",
            mend="take the dimension's scorer out, or a side's own",
        )
    some_side = next(iter(ends.values()))
    return Scale(
        name, ends.get("low", f"not {some_side}"), ends.get("high", f"not {some_side}"), scorer_of(catalogue, some_side)
    )
