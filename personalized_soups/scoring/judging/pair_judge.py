"""The types of judges, of what they compare, and of their verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from personalized_soups.declare.preference_data import Verdict

_SWAPPED: dict[Verdict, Verdict] = {"first": "second", "second": "first", "tie": "tie", "unparsed": "unparsed"}


@dataclass(frozen=True, slots=True)
class ComparedAnswers:
    """Two answers to one prompt, and the criterion by which they are compared.

    Example:
        >>> ComparedAnswers("How do I clean a lamp?", "Dust it.", "Ask someone else.", "is helpful").swapped().first
        'Ask someone else.'
    """

    prompt: str
    first: str
    second: str
    criterion: str = ""

    def swapped(self) -> ComparedAnswers:
        """Return the same comparison with the answers in the other order."""
        return ComparedAnswers(self.prompt, self.second, self.first, self.criterion)


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict on one comparison.

    Attributes:
        verdict: the better answer.
        orders: the verdicts of both orders, each as a verdict on the comparison as it was given. They are equal for a
            judge that does not depend on the order.

    Example:
        >>> Judgement.of_orders("first", "second").verdict  # the judge named what it was shown first, both times
        'tie'
    """

    verdict: Verdict
    orders: tuple[Verdict, Verdict]

    @classmethod
    def of_orders(cls, given: Verdict, swapped: Verdict) -> Judgement:
        """Return the judgement of two verdicts. Different verdicts are a tie; one that is missing leaves no verdict."""
        orders = (given, swapped)
        if "unparsed" in orders:
            return cls("unparsed", orders)
        return cls(given if given == swapped else "tie", orders)

    @classmethod
    def of_gap(cls, gap: float, min_gap: float = 0.0) -> Judgement:
        """Return the judgement of a difference of two values, first minus second.

        Example:
            >>> Judgement.of_gap(-0.4, min_gap=0.3).verdict
            'second'
        """
        verdict: Verdict = "tie" if abs(gap) <= min_gap else "first" if gap > 0 else "second"
        return cls(verdict, (verdict, verdict))


class PairJudge(Protocol):
    """Compares answers."""

    @property
    def settings(self) -> dict[str, object]:
        """The judge's kind, model and all else on which its verdicts depend, as JSON values."""

    def compare(
        self, comparisons: Sequence[ComparedAnswers], *, on_done: Callable[[int], None] | None = None
    ) -> list[Judgement]:
        """Return the judgement of each comparison. `on_done` receives the number of finished comparisons."""


def swapped_verdict(verdict: Verdict) -> Verdict:
    """Return a verdict on swapped answers as a verdict on the answers in their own order.

    Example:
        >>> swapped_verdict("first")
        'second'
    """
    return _SWAPPED[verdict]
