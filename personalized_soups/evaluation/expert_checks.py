"""Check experts by their answers: whether each works alone, and which pairs interfere.

All intervals are 95% bootstraps over prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import fsum
from typing import Literal, TypeAlias, TypedDict

from personalized_soups.evaluation.results import Interval
from personalized_soups.evaluation.scores import Graded, mean_toward, valid_share
from personalized_soups.evaluation.win_rates import bootstrap_interval

Mixtures: TypeAlias = Mapping[tuple[tuple[str, ...], float], Sequence[Graded]]
"""The graded answers by the sides that are mixed and their weight. The base is `((), 0.0)`."""

Verdict: TypeAlias = Literal["works", "fails", "unclear"]

_BASE: tuple[tuple[str, ...], float] = ((), 0.0)
# An expert that makes more than a tenth of the base's valid answers invalid does not work.
_LEAST_VALID = 0.9


class AloneCheck(TypedDict):
    """An expert alone at one weight.

    `difference` is the mean score towards its side, minus the base's. `moved` has this difference for every side. The
    expert works if the whole interval is above 0. It fails if no part of it is, or if the expert has fewer than 0.9 of
    the base's valid answers. Otherwise more prompts are needed to tell.
    """

    side: str
    weight: float
    base: float
    score: float
    difference: float
    interval: Interval
    valid: float
    moved: Mapping[str, float]
    verdict: Verdict


class PairCheck(TypedDict):
    """One side of a pair of experts: its score in the pair minus that of its expert alone, at the same weight.

    The other expert interferes if the interval is below 0.
    """

    side: str
    other: str
    weight: float
    alone: float
    pair: float
    difference: float
    interval: Interval
    interferes: bool


class Warned(TypedDict):
    """A finding of the doctor."""

    severity: str
    what: str
    mend: str


class ExpertChecks(TypedDict):
    """All checks of experts."""

    weight: float
    alone: Sequence[AloneCheck]
    pairs: Sequence[PairCheck]
    findings: Sequence[Warned]


def check_alone(mixtures: Mixtures, sides: Sequence[str], *, seed: int = 0) -> list[AloneCheck]:
    """Return the check of each expert alone, at each weight at which it was measured."""
    base = mixtures[_BASE]
    found = []
    for (mixed, weight), graded in mixtures.items():
        if len(mixed) != 1:
            continue
        side = mixed[0]
        difference, interval = _difference(graded, base, side, seed)
        valid = valid_share(graded)
        check: AloneCheck = {
            "side": side,
            "weight": weight,
            "base": mean_toward(base, side),
            "score": mean_toward(graded, side),
            "difference": difference,
            "interval": interval,
            "valid": valid,
            "moved": {other: mean_toward(graded, other) - mean_toward(base, other) for other in sides},
            "verdict": _verdict(interval, is_valid=valid >= _LEAST_VALID * valid_share(base)),
        }
        found.append(check)
    return found


def check_pairs(mixtures: Mixtures, *, seed: int = 0) -> list[PairCheck]:
    """Return the check of each side of each pair."""
    found = []
    for (mixed, weight), graded in mixtures.items():
        if len(mixed) != 2:
            continue
        for side, other in (mixed, mixed[::-1]):
            alone = mixtures[(side,), weight]
            difference, interval = _difference(graded, alone, side, seed)
            check: PairCheck = {
                "side": side,
                "other": other,
                "weight": weight,
                "alone": mean_toward(alone, side),
                "pair": mean_toward(graded, side),
                "difference": difference,
                "interval": interval,
                "interferes": interval[1] < 0,
            }
            found.append(check)
    return found


def _verdict(interval: Interval, *, is_valid: bool) -> Verdict:
    if not is_valid or interval[1] <= 0:
        return "fails"
    return "works" if interval[0] > 0 else "unclear"


def _difference(graded: Sequence[Graded], other: Sequence[Graded], side: str, seed: int) -> tuple[float, list[float]]:
    differences = [ours.toward[side] - theirs.toward[side] for ours, theirs in zip(graded, other, strict=True)]
    return fsum(differences) / len(differences), list(bootstrap_interval(differences, seed=seed))
