"""A row of the table: two figures side by side, their ratio, and the bar that it must reach."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

Part = Literal["cpu", "gpu", "serving"]

HEAD = ("row", "work", "ours", "against", "theirs", "ratio", "bar", "met")


@dataclass(frozen=True, slots=True)
class Bar:
    """What must be reached, by the ratio where the unit is x and by our own figure else."""

    kind: Literal["at least", "at most", "below"]
    value: float
    unit: str = "x"

    def is_met(self, figure: float) -> bool:
        """Return whether a figure reaches it; NaN does not."""
        if self.kind == "at least":
            return figure >= self.value
        return figure <= self.value if self.kind == "at most" else figure < self.value

    def __str__(self) -> str:
        return f"{self.kind} {shown(self.value, self.unit)}"


@dataclass(frozen=True, slots=True)
class Row:
    """One row of the table.

    Args:
        name: by which it is asked for.
        work: what is done.
        against: what it is compared with.
        part: to which table it belongs: merging and mixing on the processor, or on the GPU; serving.
        unit: of `ours` and `theirs`: s, ms, MB, bytes, GB/s, tok/s, or none for errors.
        ours: this project's figure, the median of its runs; none where it is not there.
        theirs: the other's figure; none where the bar is on our figure alone.
        ratio: how many times better (`at least` bars) or worse (`at most` bars) we are; none where there is no other.
        bar: what must be reached; none where the row only informs.
        note: why there is no figure, or what the reader must know of it.
        spread: the least and the greatest of our runs, then of the other's.
    """

    name: str
    work: str
    against: str
    part: Part = "cpu"
    unit: str = "s"
    ours: float | None = None
    theirs: float | None = None
    ratio: float | None = None
    bar: Bar | None = None
    note: str = ""
    spread: tuple[tuple[float, float], ...] = ()

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is reached; None where there is no bar or no figure."""
        if self.bar is None:
            return None
        figure = self.ratio if self.bar.unit == "x" else self.ours
        return None if figure is None else self.bar.is_met(figure)

    @property
    def cells(self) -> tuple[str, ...]:
        """What the table shows, in the order of HEAD."""
        met = {True: "yes", False: "NO", None: "-"}[self.is_met]
        return (
            self.name,
            self.work,
            # without a figure, the first words of the note say why
            self.note.partition(":")[0] if self.ours is None and self.note else shown(self.ours, self.unit),
            self.against,
            shown(self.theirs, self.unit),
            shown(self.ratio, "x"),
            "-" if self.bar is None else str(self.bar),
            met,
        )

    def as_json(self) -> dict[str, Any]:
        """Return what JSON can hold: a figure that is not finite becomes none."""
        return {**_finite(asdict(self)), "met": self.is_met}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Self:
        """Return the row that `as_json` gave."""
        fields = {key: inner for key, inner in value.items() if key != "met"}
        bar = None if fields["bar"] is None else Bar(**fields["bar"])
        return cls(**{**fields, "bar": bar, "spread": tuple(tuple(pair) for pair in fields["spread"])})


def spread(*runs: Sequence[float]) -> tuple[tuple[float, float], ...]:
    """Return the least and the greatest of each list of runs."""
    return tuple((min(each), max(each)) for each in runs if each)


def shown(value: float | None, unit: str) -> str:
    """Return a figure with its unit, three digits at most where they say something."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if unit == "" and 0 < abs(value) < 0.01:
        return f"{value:.1e}"
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return digits + unit if unit in {"", "x"} else f"{digits} {unit}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
