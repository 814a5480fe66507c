"""Draw curves of a figure against the number of answers that a user gave, with reference lines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.evaluation.pictures.style import (
    FAINT,
    INK,
    LINE,
    QUIET,
    WIDTH,
    draw_title,
    own_settings,
    write_png,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinguishable with every kind of color vision (Wong 2011, "Points of view: Color blindness").
COLORS = (LINE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a5195", "#8c6d31")


@dataclass(frozen=True, slots=True)
class AnswerCurve:
    """One line of a panel.

    Attributes:
        name: the label at the line's end.
        points: pairs (number of answers, figure), sorted by the number of answers.
        color: the index of the line's color in `COLORS`, so a line has the same color in all panels.
    """

    name: str
    points: Sequence[tuple[float, float]]
    color: int


@dataclass(frozen=True, slots=True)
class AnswerPanel:
    """One panel: curves, and horizontal lines for figures that do not depend on answers.

    Attributes:
        title: the figure that the panel shows.
        note: a second line below the title.
        curves: the curves.
        references: the name and the value of each horizontal line.
        ends: the ends of the figure's axis.
    """

    title: str
    note: str
    curves: Sequence[AnswerCurve]
    references: Sequence[tuple[str, float]]
    ends: tuple[float, float]


def draw_answer_curves(title: str, subtitle: str, panels: Sequence[AnswerPanel], path: Path) -> Path:
    """Write a PNG file with the panels in up to two columns, and return its path.

    Raises:
        UsageError: if matplotlib is missing.
        ValueError: if there are no panels.
    """
    with own_settings():
        return write_png(answer_figure(title, subtitle, panels), path)


def answer_figure(title: str, subtitle: str, panels: Sequence[AnswerPanel]) -> Figure:
    """Return the figure that `draw_answer_curves` writes.

    Raises:
        ValueError: if there are no panels.
    """
    from matplotlib.figure import Figure

    if not panels:
        raise ValueError("there are no panels to draw")
    columns = min(2, len(panels))
    lines = ceil(len(panels) / columns)
    panel, top, head, foot = 2.6, 0.85, 0.62, 0.55  # inches
    height = top + lines * (head + panel + foot)
    figure = Figure(figsize=(WIDTH, height))
    draw_title(figure, title, subtitle)
    left, label, between = 0.06, 0.17, 0.03  # `label` is the space for the names at the ends of the lines
    width = (1 - left - columns * label - (columns - 1) * between) / columns
    for at, content in enumerate(panels):
        line, column = divmod(at, columns)
        y = 1 - (top + (line + 1) * (head + panel) + line * foot) / height
        x = left + column * (width + label + between)
        _draw_panel(figure.add_axes((x, y, width, panel / height)), content)
    return figure


def _draw_panel(axes: Axes, panel: AnswerPanel) -> None:
    low, high = panel.ends
    most = max(point[0] for curve in panel.curves for point in curve.points)
    axes.set(xlim=(0, most), ylim=(low, high))
    marks = sorted({point[0] for curve in panel.curves for point in curve.points})
    axes.set_xticks([mark for mark in marks if mark in {0, 5, 10, 20, 40}])
    axes.set_xlabel("answers", color=QUIET, fontsize=9.5)
    axes.grid(axis="y", color="#edf0f3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelsize=9.5, labelcolor=QUIET)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(FAINT)
    labels = []
    for name, value in panel.references:
        axes.axhline(value, color=QUIET, linewidth=1, dashes=(4, 3))
        labels.append((value, name, QUIET))
    for curve in panel.curves:
        color = COLORS[curve.color % len(COLORS)]
        x, y = zip(*curve.points, strict=True)
        axes.plot(x, y, color=color, linewidth=2, marker="o", markersize=3.5, clip_on=False, zorder=3)
        labels.append((y[-1], curve.name, color))
    for place, (value, name, color) in zip(_spread([label[0] for label in labels], panel.ends), labels, strict=True):
        axes.annotate(
            name,
            (most, min(max(value, low), high)),
            xytext=(1.03, (place - low) / (high - low)),
            textcoords="axes fraction",
            color=color,
            fontsize=9,
            va="center",
            annotation_clip=False,
        )
    axes.text(0, 1.13, panel.title, transform=axes.transAxes, fontsize=11, weight="bold", va="baseline", color=INK)
    axes.text(0, 1.045, panel.note, transform=axes.transAxes, fontsize=9, color=QUIET, va="baseline")


def _spread(values: Sequence[float], ends: tuple[float, float]) -> list[float]:
    """Return the places of labels: as near to their values as possible, but at least a line of text apart."""
    least = 0.062 * (ends[1] - ends[0])
    order = sorted(range(len(values)), key=lambda at: values[at])
    places = [min(max(values[at], ends[0]), ends[1]) for at in order]
    # Push overlapping neighbours apart by equal amounts until none overlap. Each sweep at least halves an overlap.
    for _ in range(200):
        for at in range(len(places) - 1):
            overlap = least - (places[at + 1] - places[at])
            if overlap > 0:
                places[at] -= overlap / 2
                places[at + 1] += overlap / 2
    result = [0.0] * len(values)
    for at, place in zip(order, places, strict=True):
        result[at] = place
    return result
