"""`MeanScorer`: one score for a user who prefers several sides at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.scoring.scorers import Scored, scorer_of


class MeanScorer:
    """Scores an answer by the mean of its scores towards several sides: the reward of P-MORL (arXiv:2310.11564).

    With weights, it is the weighted mean: the reward of a backbone of Bone Soups.

    An answer that one of the sides' scorers calls invalid is invalid.

    Args:
        catalogue: declares the sides and their scorers.
        sides: the sides, or a positive weight for each. With all sides of a catalogue, every valid answer has the score
            0.5.

    Raises:
        DeclarationError: if a side is not in the catalogue, or has no scorer.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> scorer = MeanScorer(catalogue, ["concise", "friendly"])
        >>> scorer("How do I clean a lamp?", "Dust it.").value
        0.75
    """

    def __init__(self, catalogue: Catalogue, sides: Sequence[str] | Mapping[str, float]) -> None:
        weights = sides if isinstance(sides, Mapping) else dict.fromkeys(sides, 1.0)
        self._parts = [
            (scorer_of(catalogue, side), catalogue.side(side)[1].end, weight) for side, weight in weights.items()
        ]
        self._total = fsum(weights.values())

    def __call__(self, prompt: str, answer: str, /) -> Scored:
        """Return the mean score. Its high end is what the sides want."""
        scored = [(scorer(prompt, answer), end, weight) for scorer, end, weight in self._parts]
        valid = all(score.valid for score, _, _ in scored)
        return Scored(fsum(weight * score.toward(end) for score, end, weight in scored) / self._total, valid)
