"""`MeanScorer`: one score for a user who prefers several sides at once."""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum

from personalized_soups.declare.dimension import Catalogue
from personalized_soups.scoring.scorers import Scored, scorer_of


class MeanScorer:
    """Scores an answer by the mean of its scores towards several sides: the reward of P-MORL (arXiv:2310.11564).

    An answer that one of the sides' scorers calls invalid is invalid.

    Args:
        catalogue: declares the sides and their scorers.
        sides: the sides. With all sides of a catalogue, every valid answer has the score 0.5.

    Raises:
        DeclarationError: if a side is not in the catalogue, or has no scorer.

    Example:
        >>> catalogue = load(shipped_recipe("dimensions/psoups.yaml"), Catalogue)
        >>> scorer = MeanScorer(catalogue, ["concise", "friendly"])
        >>> scorer("How do I clean a lamp?", "Dust it.").value
        0.75
    """

    def __init__(self, catalogue: Catalogue, sides: Sequence[str]) -> None:
        self._parts = [(scorer_of(catalogue, side), catalogue.side(side)[1].end) for side in sides]

    def __call__(self, prompt: str, answer: str, /) -> Scored:
        """Return the mean score. Its high end is what the sides want."""
        scored = [(scorer(prompt, answer), end) for scorer, end in self._parts]
        valid = all(score.valid for score, _ in scored)
        return Scored(fsum(score.toward(end) for score, end in scored) / len(scored), valid)
