"""Progress reports of a training; the caller decides how to show them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepReport:
    """The figures of one optimizer step.

    Args:
        step: steps done, including this step.
        num_steps: steps of the whole training.
        loss: DPO loss plus the weighted SFT term.
        margin: mean reward of the chosen answers minus that of the rejected ones.
        accuracy: share of pairs whose chosen answer has the higher reward.
        learning_rate: learning rate of this step.
    """

    step: int
    num_steps: int
    loss: float
    margin: float
    accuracy: float
    learning_rate: float


class TrainingProgress(Protocol):
    """Receives the progress of trainings. Each call names the side, since several experts may train at once."""

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Called before the first step; a resumed training has done `step` of `num_steps` already."""
        ...

    def advance(self, side: str, report: StepReport) -> None:
        """Called after each step."""
        ...

    def note(self, side: str, text: str) -> None:
        """Called with a note for the user."""
        ...

    def end(self, side: str) -> None:
        """Called when the expert is written."""
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
