"""The bounds of fluency that `psoups pairs` and other commands read, and the answers within them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.cli import render

if TYPE_CHECKING:
    from collections.abc import Sequence

    from personalized_soups.cli.bases import LoadOptions
    from personalized_soups.declare.fluency import FluencyBounds
    from personalized_soups.training.rollouts import Sampled


def bounds_of(fluency: Path | None) -> FluencyBounds | None:
    """Return the bounds in the file `fluency`, or None if it is None.

    Raises:
        DeclarationError: if the file cannot be read or is invalid.
    """
    if fluency is None:
        return None
    from personalized_soups.declare.fluency import FluencyBounds
    from personalized_soups.declare.loader import load

    return load(fluency, FluencyBounds)


def fluent_answers(
    answers: Sequence[Sampled], bounds: FluencyBounds, loading: LoadOptions, *, quiet: bool
) -> list[Sampled]:
    """Return the pool without the answers that are not fluent. The log-probabilities are those of the bare base.

    Raises:
        SoupError: if the base cannot be loaded, is not that of the bounds, or no answer is fluent.
    """
    from personalized_soups.scoring.fluency import FluencyGate
    from personalized_soups.training.fluent_pool import fluent_pool

    gate = FluencyGate.open(loading.path, bounds, device=loading.device, dtype=loading.dtype)
    total = sum(len(sampled.answers) for sampled in answers)
    with render.progress("checking fluency", total, quiet=quiet) as bar:
        fluent = fluent_pool(answers, gate, on_done=bar.update)
    num_left = sum(len(sampled.answers) for sampled in fluent)
    if not quiet:
        render.say(f"{num_left} of {total} answers are fluent")
    return fluent
