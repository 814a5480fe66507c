"""The options that limit which pairs of answers are kept."""

from __future__ import annotations

from typing import Annotated

import typer

from personalized_soups.errors import UsageError

MinGapOption = Annotated[float, typer.Option(help="Minimum difference between the two scores of a pair, in (0, 1].")]
MaxPairsOption = Annotated[int | None, typer.Option(min=1, help="Maximum number of pairs to keep.")]


def check_min_gap(min_gap: float) -> None:
    """Check that the minimum difference of two scores is in (0, 1].

    Raises:
        UsageError: if it is not.
    """
    if not 0 < min_gap <= 1:
        raise UsageError(
            f"the value is {min_gap:g}, but it must be in (0, 1]", where="--min-gap", mend="give --min-gap 0.3"
        )
