"""Checks and messages for files of answers that grow while a command runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from personalized_soups.cli import render
from personalized_soups.errors import UsageError


def check_no_input(out: Path | None, inputs: Sequence[Path]) -> None:
    """Raise UsageError if the output file is also an input file.

    Raises:
        UsageError: if `out` is one of `inputs`.
    """
    for path in inputs:
        if out is not None and out.exists() and path.exists() and out.samefile(path):
            raise UsageError(
                "the output file is also an input file", where=f"--out {out}", mend="give --out another path"
            )


@contextmanager
def reporting_kept_answers(out: Path | None) -> Iterator[None]:
    """On Ctrl-C, print that the answers written so far are kept in `out`."""
    try:
        yield
    except KeyboardInterrupt:
        if out is not None:
            render.say(f"the answers so far are kept in {out}: run the same command again to resume")
        raise
