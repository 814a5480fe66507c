"""A progress bar for one training."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from personalized_soups.cli import render

if TYPE_CHECKING:
    from personalized_soups.training.progress import StepReport


class BarProgress:
    """Show the training of one expert as a progress bar.

    Args:
        quiet: show no bar. Notes are still printed.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self._quiet = quiet
        self._stack = ExitStack()
        self._bar: render.Bar | None = None

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Show the bar. The training starts after `step` of `num_steps` steps."""
        bar = render.progress(f"training {side}", num_steps, done=step, quiet=self._quiet)
        self._bar = self._stack.enter_context(bar)

    def advance(self, side: str, report: StepReport) -> None:
        """Advance the bar and show the step's figures."""
        if self._bar is not None:
            self._bar.update(report.step, loss=report.loss, **dict[str, Any](report.figures))

    def note(self, side: str, text: str) -> None:
        """Print a note on stderr."""
        render.say(f"{side}: {text}")

    def end(self, side: str) -> None:
        """Close the bar."""
        self.close()

    def close(self) -> None:
        """Close the bar. This is also called after an error."""
        self._stack.close()
        self._bar = None
