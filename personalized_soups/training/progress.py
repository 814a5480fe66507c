"""Report the progress of a training. The caller decides how to show the reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepReport:
    """The figures of one optimizer step.

    Args:
        step: the number of finished steps, including this step.
        num_steps: the number of steps of the whole training.
        loss: the loss, with all its terms.
        figures: further figures by name. For pairs, `margin` is the mean reward of the chosen answers minus that of the
            rejected answers, and `accuracy` the share of pairs whose chosen answer has the higher reward.
        learning_rate: the learning rate of this step.
    """

    step: int
    num_steps: int
    loss: float
    figures: Mapping[str, float]
    learning_rate: float


class TrainingProgress(Protocol):
    """Receives the progress of trainings. Each call names the side, since several experts may train at once."""

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Called before the first step. A resumed training has already done `step` of `num_steps` steps."""
        ...

    def advance(self, side: str, report: StepReport) -> None:
        """Called after each step."""
        ...

    def note(self, side: str, text: str) -> None:
        """Called with a note for the user."""
        ...

    def end(self, side: str) -> None:
        """Called when the expert has been written."""
        ...


class Silent:
    """Ignores all progress."""

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Ignore."""

    def advance(self, side: str, report: StepReport) -> None:
        """Ignore."""

    def note(self, side: str, text: str) -> None:
        """Ignore."""

    def end(self, side: str) -> None:
        """Ignore."""
