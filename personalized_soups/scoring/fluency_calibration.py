"""Calibrate the bounds of a fluency gate on a base's own answers."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from personalized_soups.declare.fluency import FluencyBounds
from personalized_soups.errors import InputError
from personalized_soups.scoring.fluency import CHECKS, MeasuredText, failed_checks, fixed_checks

# A tenth of repeated sequences is no loop yet, even if the base repeats itself less.
_MOST_DISTINCT = 0.9


def calibrate_fluency(
    measured: Sequence[MeasuredText],
    *,
    accept: float = 0.97,
    max_new_tokens: int | None = None,
    min_script: float = 0.9,
    base: str = "",
) -> FluencyBounds:
    """Return bounds that accept a share of `accept` of the base's further answers.

    The bounds of likelihood and of loops are order statistics of the answers, as in split conformal prediction (Vovk et
    al. 2005, Algorithmic Learning in a Random World): if a further answer is drawn like the given ones, the chance that
    it is below the k-th smallest of n is at most k / (n + 1). The answers that the fixed checks reject (words, script
    and end) count against the share, too.

    Sample the answers as the study samples its own: a lower temperature makes likelier answers, and so stricter bounds.

    Args:
        measured: the base's own answers to plain prompts, from `FluencyGate.measure`.
        accept: the share of the base's answers to accept, in (0, 1).
        max_new_tokens: the number of tokens at which the answers were cut, or None to accept any end.
        min_script: the smallest share of letters that must be of the prompt's script.
        base: the fingerprint of the base.

    Raises:
        InputError: if the fixed checks alone reject too many answers, or there are too few answers for the share.
        ValueError: if `accept` is not in (0, 1).

    Example:
        >>> rng = np.random.default_rng(0)
        >>> answers = [MeasuredText(50, -1.5 + 0.2 * x, 5.0, 1.0, 1.0, True, True) for x in rng.standard_normal(200)]
        >>> bounds = calibrate_fluency(answers)
        >>> sum(not failed_checks(answer, bounds) for answer in answers) / 200
        0.99
    """
    if not 0 < accept < 1:
        raise ValueError(f"accept must be in (0, 1), got {accept}")
    sound = [
        answer for answer in measured if not fixed_checks(answer, min_script=min_script, max_new_tokens=max_new_tokens)
    ]
    budget = 1 - accept * len(measured) / len(sound) if sound else -1.0
    if budget <= 0:
        raise _too_many_rejected(measured, accept, min_script=min_script, max_new_tokens=max_new_tokens)
    # Each of the two bounds may reject half of the budget.
    rank = math.floor((len(sound) + 1) * budget / 2)
    if rank < 1:
        least = math.ceil((2 / budget - 1) * len(measured) / len(sound))
        raise InputError(
            f"{len(measured)} answers are too few to accept a share of {accept:g}; the checks of words, script and end "
            f"reject {len(measured) - len(sound)} of them",
            where="the answers of the base",
            mend=f"give at least {least} answers, or accept a smaller share",
        )
    typical, between_texts, between_tokens = _spread(sound)
    fitted = FluencyBounds(
        typical=typical, between_texts=between_texts, between_tokens=between_tokens, max_deviations=0.0
    )
    below = sorted((typical - answer.log_prob) / fitted.deviation(answer.num_tokens) for answer in sound)
    bounds = fitted.replaced(
        max_deviations=below[-rank],
        min_distinct=min(_MOST_DISTINCT, sorted(answer.distinct for answer in sound)[rank - 1]),
        min_script=min_script,
        max_new_tokens=max_new_tokens,
        base=base,
    )
    accepted = sum(not failed_checks(answer, bounds) for answer in measured)
    return bounds.replaced(
        about={"accept": accept, "num_answers": float(len(measured)), "accepted": accepted / len(measured)}
    )


def _spread(measured: Sequence[MeasuredText]) -> tuple[float, float, float]:
    """Return the typical log-probability, and its standard deviations between texts and between tokens.

    These are the estimates of the one-way random-effects model by the method of moments (Searle et al. 1992, Variance
    Components, chapter 3), with texts as groups.
    """
    counts, means, squares = np.array([[a.num_tokens, a.log_prob, a.square] for a in measured], dtype=np.float64).T
    within = float((counts * (squares - means**2)).sum() / max(1.0, (counts - 1).sum()))
    between = float(means.var(ddof=1)) - within * float((1 / counts).mean()) if len(means) > 1 else 0.0
    # A deviation of 0 could not divide; that of equal answers does not matter.
    return float(means.mean()), math.sqrt(max(0.0, between)), math.sqrt(max(within, 1e-12))


def _too_many_rejected(
    measured: Sequence[MeasuredText], accept: float, *, min_script: float, max_new_tokens: int | None
) -> InputError:
    counts = Counter(
        check
        for answer in measured
        for check in fixed_checks(answer, min_script=min_script, max_new_tokens=max_new_tokens)
    )
    shown = ", ".join(f"{check} {counts[check]}" for check in CHECKS if counts[check]) or "there are no answers"
    return InputError(
        f"{accept:g} of the answers can't be accepted: of {len(measured)} answers, the checks reject {shown}",
        where="the answers of the base",
        mend="read the answers; give the max_new_tokens that they were sampled with, or accept a smaller share",
    )


def num_failed(measured: Sequence[MeasuredText], bounds: FluencyBounds) -> dict[str, int]:
    """Return the number of answers that fail each check, for the checks that some answer fails."""
    counts = Counter(check for answer in measured for check in failed_checks(answer, bounds))
    return {check: counts[check] for check in CHECKS if counts[check]}
