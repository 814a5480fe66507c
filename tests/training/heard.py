"""A progress that keeps what it hears, and stops a training if asked."""

from __future__ import annotations

from personalized_soups.training.progress import Silent, StepReport


class Heard(Silent):
    """Stores all progress; raises KeyboardInterrupt once, at a given step."""

    def __init__(self, *, stop_at: int | None = None) -> None:
        self.reports: list[StepReport] = []
        self.begun: list[int] = []
        self.notes: list[str] = []
        self.ended = 0
        self.stop_at = stop_at

    def begin(self, side: str, *, step: int, num_steps: int) -> None:
        self.begun.append(step)

    def advance(self, side: str, report: StepReport) -> None:
        self.reports.append(report)
        if report.step == self.stop_at:
            raise KeyboardInterrupt

    def note(self, side: str, text: str) -> None:
        self.notes.append(text)

    def end(self, side: str) -> None:
        self.ended += 1
