"""What a training tells while it runs; whoever calls it decides how that looks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class StepReport:
    """One optimizer step.

    Args:
        step: steps done, this one included.
        num_steps: steps in all.
        loss: DPO loss plus the weighted SFT term.
        margin: mean reward of the chosen answers minus that of the rejected ones.
        accuracy: share of pairs whose chosen answer has the higher reward.
        learning_rate: of this step.
    """

    step: int
    num_steps: int
    loss: float
    margin: float
    accuracy: float
    learning_rate: float


class TrainingProgress(Protocol):
    """Hears of a training; each call names the side, since several experts may train at once."""

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """The steps begin; `step` are done already where a training goes on."""
        ...

    def advance(self, side: str, report: StepReport) -> None:
        """A step is done."""
        ...

    def note(self, side: str, text: str) -> None:
        """Something that the reader should know."""
        ...

    def end(self, side: str) -> None:
        """The expert is written."""
        ...


class Silent:
    """Says nothing."""

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        """Say nothing."""

    def advance(self, side: str, report: StepReport) -> None:
        """Say nothing."""

    def note(self, side: str, text: str) -> None:
        """Say nothing."""

    def end(self, side: str) -> None:
        """Say nothing."""
