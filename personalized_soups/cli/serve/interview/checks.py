"""Checks of the options of `psoups profile infer`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from personalized_soups.errors import UsageError, choose_from

if TYPE_CHECKING:
    from personalized_soups.users.answers.selection import Rule
    from personalized_soups.users.answers.stopping import StoppingRule


def check_modes(*, refit: bool, restart: bool, simulate: Path | None) -> None:
    """Raise UsageError if --refit is combined with an option that needs questions."""
    other = "--restart deletes them" if restart else "a simulated user has none"
    if refit and (restart or simulate is not None):
        option = "--restart" if restart else "--simulate"
        raise UsageError(
            f"--refit uses the stored answers, but {other}",
            where=f"--refit, {option}",
            mend="remove one of the two options",
        )


def checked_stopping(questions: int, certainty: float | None) -> StoppingRule:
    """Return the stopping rule of --questions and --certainty, or raise UsageError."""
    from personalized_soups.users.answers.stopping import StoppingRule

    if certainty is not None and not 0.5 < certainty <= 1:
        raise UsageError(
            f"the certainty is {certainty:g}, but it must be above 0.5, which is guessing, and at most 1",
            where="--certainty",
            mend="give --certainty 0.9",
        )
    return StoppingRule(questions, certainty)


def checked_rule(name: str) -> Rule:
    """Return the value of --rule, or raise UsageError."""
    from personalized_soups.users.answers.selection import Rule

    known: tuple[Rule, ...] = get_args(Rule)
    for rule in known:
        if rule == name:
            return rule
    raise UsageError(f"unknown rule {name!r}", where="--rule", mend=choose_from(name, known))


def checked_noise(noise: float) -> float:
    """Return the value of --noise, or raise UsageError."""
    if not 0 <= noise < 0.5:
        raise UsageError(
            f"the noise is {noise:g}, but it must be at least 0 and less than 0.5, which is random",
            where="--noise",
            mend="give --noise 0.05 if about one key in twenty is wrong",
        )
    return noise


def checked_scale(scale: float | None) -> float | None:
    """Return the value of --scale, or raise UsageError."""
    if scale is not None and not 0 < scale < math.inf:
        raise UsageError(
            f"the scale is {scale:g}, but it must be a finite number greater than 0",
            where="--scale",
            mend="give --scale 0.6",
        )
    return scale
