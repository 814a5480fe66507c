"""How far a judge can be trusted: its agreement with people, and whether position or length decides its verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from personalized_soups.declare.preference_data import Verdict
from personalized_soups.evaluation.win_rates import ratio_interval
from personalized_soups.scoring.judging.pair_judge import ComparedAnswers, Judgement

_DECIDED = ("first", "second")
_VERDICTS: tuple[Verdict, ...] = ("first", "second", "tie")


@dataclass(frozen=True, slots=True)
class Share:
    """A share of some cases, with its 95% interval. The cases of one prompt are resampled together.

    Attributes:
        value: the share, in [0, 1].
        low, high: the ends of the interval.
        num: the number of cases.
    """

    value: float
    low: float
    high: float
    num: int


@dataclass(frozen=True, slots=True)
class JudgeReport:
    """What can be said of a judge without knowing the right verdicts.

    Attributes:
        counts: the number of comparisons for each verdict, `unparsed` included.
        first_shown: of all verdicts for one answer, in either order, the share that names the answer shown first. 0.5
            means that the position does not matter. None if there is no such verdict.
        flipped: of the comparisons with a verdict in both orders, the share whose two verdicts differ.
        longer: of the comparisons that one answer wins, the share that the answer with more characters wins.
    """

    counts: dict[Verdict, int]
    first_shown: Share | None
    flipped: Share | None
    longer: Share | None


@dataclass(frozen=True, slots=True)
class HumanComparison:
    """A comparison and the answer that people prefer."""

    answers: ComparedAnswers
    preferred: Verdict


@dataclass(frozen=True, slots=True)
class Agreement:
    """How well a judge agrees with people.

    Attributes:
        accuracy: of the comparisons that both people and the judge decide, the share with the same winner.
        credit: of the comparisons that people decide, the share in which the judge names the winner. A tie or a missing
            verdict counts as half.
        longer: `credit` of a judge that always names the longer answer. A judge should be above it.
        kappa: Cohen's kappa of the verdicts `first`, `second` and `tie`, without missing verdicts. 0 is chance, and 1
            is full agreement. None if it is not defined, because both give one verdict only.
    """

    accuracy: Share | None
    credit: Share | None
    longer: Share | None
    kappa: float | None


def judge_report(comparisons: Sequence[ComparedAnswers], judgements: Sequence[Judgement]) -> JudgeReport:
    """Return the counts and the biases of a judge's verdicts.

    Args:
        comparisons: what was compared.
        judgements: the judgement of each comparison.

    Raises:
        ValueError: if the two differ in length.

    Example:
        >>> report = judge_report([ComparedAnswers("Why?", "Short.", "A long one.")], [Judgement.of_gap(-1.0)])
        >>> report.longer.value
        1.0
    """
    pairs = list(zip(comparisons, judgements, strict=True))
    counts = Counter(judgement.verdict for _, judgement in pairs)
    return JudgeReport(
        counts={verdict: counts[verdict] for verdict in (*_VERDICTS, "unparsed")},
        first_shown=_share((each.prompt, *_first_shown(judgement)) for each, judgement in pairs),
        flipped=_share(
            (each.prompt, float(judgement.orders[0] != judgement.orders[1]), float("unparsed" not in judgement.orders))
            for each, judgement in pairs
        ),
        longer=_share(
            (each.prompt, float(judgement.verdict == _longer(each)), 1.0)
            for each, judgement in pairs
            if judgement.verdict in _DECIDED and _longer(each) != "tie"
        ),
    )


def agreement(people: Sequence[HumanComparison], judgements: Sequence[Judgement]) -> Agreement:
    """Return how well a judge agrees with people.

    Args:
        people: the comparisons, and what people prefer.
        judgements: the judge's judgement of each comparison.

    Raises:
        ValueError: if the two differ in length.

    Example:
        >>> human = HumanComparison(ComparedAnswers("Why?", "Short.", "A long one."), "second")
        >>> agreement([human], [Judgement.of_gap(-1.0)]).accuracy.value
        1.0
    """
    pairs = [(human, judgement.verdict) for human, judgement in zip(people, judgements, strict=True)]
    decided = [(human, verdict) for human, verdict in pairs if human.preferred in _DECIDED]
    return Agreement(
        accuracy=_share(
            (human.answers.prompt, float(verdict == human.preferred), 1.0)
            for human, verdict in decided
            if verdict in _DECIDED
        ),
        credit=_share((human.answers.prompt, _credit(verdict, human), 1.0) for human, verdict in decided),
        longer=_share((human.answers.prompt, _credit(_longer(human.answers), human), 1.0) for human, _ in decided),
        kappa=_kappa([(human.preferred, verdict) for human, verdict in pairs if verdict != "unparsed"]),
    )


Case: TypeAlias = tuple[str, float, float]
"""A prompt, the part of it that counts, and the whole."""


def _share(cases: Iterable[Case]) -> Share | None:
    """Return the share over all cases, or None without any. Cases of one prompt are one cluster of the bootstrap."""
    parts: dict[str, float] = {}
    wholes: dict[str, float] = {}
    for prompt, part, whole in cases:
        parts[prompt] = parts.get(prompt, 0.0) + part * (whole > 0)
        wholes[prompt] = wholes.get(prompt, 0.0) + whole
    num = sum(wholes.values())
    if num <= 0:
        return None
    low, high = ratio_interval(list(parts.values()), list(wholes.values()))
    return Share(sum(parts.values()) / num, low, high, round(num))


def _first_shown(judgement: Judgement) -> tuple[float, float]:
    """Return how many verdicts for one answer name the answer shown first, and how many there are."""
    given, swapped = judgement.orders
    chosen = float(given == "first") + float(swapped == "second")
    return chosen, float(given in _DECIDED) + float(swapped in _DECIDED)


def _longer(comparison: ComparedAnswers) -> Verdict:
    difference = len(comparison.first) - len(comparison.second)
    return "tie" if difference == 0 else "first" if difference > 0 else "second"


def _credit(verdict: Verdict, human: HumanComparison) -> float:
    return 1.0 if verdict == human.preferred else 0.0 if verdict in _DECIDED else 0.5


def _kappa(pairs: Sequence[tuple[Verdict, Verdict]]) -> float | None:
    """Return Cohen's kappa (Cohen 1960): (observed - expected) / (1 - expected) agreement."""
    if not pairs:
        return None
    observed = sum(ours == theirs for ours, theirs in pairs) / len(pairs)
    ours_counts, theirs_counts = Counter(ours for ours, _ in pairs), Counter(theirs for _, theirs in pairs)
    expected = sum(ours_counts[verdict] * theirs_counts[verdict] for verdict in _VERDICTS) / len(pairs) ** 2
    return None if expected == 1.0 else (observed - expected) / (1.0 - expected)
