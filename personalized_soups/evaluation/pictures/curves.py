"""Draw the curves of sweeps: a score against the weight of one side's expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.evaluation.pictures.style import FAINT, LINE, QUIET, WIDTH, draw_title, own_settings, write_png
from personalized_soups.evaluation.results import Interval, Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_MARKERS = 25  # more markers would overlap


@dataclass(frozen=True, slots=True)
class Curve:
    """One sweep: the scores while the weight w moves from one side's expert to another side's expert.

    Attributes:
        low: the side whose expert has the weight 1 - w.
        high: the side whose expert has the weight w.
        score: the name of the score.
        points: pairs (w, score), sorted by w.
        base: the score of the base alone.
        intervals: the 95% interval of each point's score. It may be empty.
        top: the upper end of the score's axis, which begins at 0.
        title: the title above the panel.
        note: the subtitle of a picture with a single panel.
    """

    low: str
    high: str
    score: str
    points: Sequence[Sequence[float]]
    base: float
    intervals: Sequence[Interval] = ()
    top: float = 1.0
    title: str = ""
    note: str = ""


def draw_sweeps(results: Results, path: Path) -> Path:
    """Write a PNG file with a panel for each dimension: its score against the weight of one side's expert.

    Raises:
        UsageError: if matplotlib is missing.
        ValueError: if the results have no sweeps.
    """
    with own_settings():
        return write_png(sweeps_figure(results), path)


def draw_curve(curve: Curve, path: Path) -> Path:
    """Write a PNG file with one panel: a score against the weight of one side's expert.

    Raises:
        UsageError: if matplotlib is missing.
    """
    with own_settings():
        return write_png(curve_figure(curve), path)


def curve_figure(curve: Curve) -> Figure:
    """Return the figure that `draw_curve` writes."""
    from matplotlib.figure import Figure

    width, panel, top, foot = WIDTH * 0.62, 2.9, 1.2, 0.6  # inches
    height = top + panel + foot
    figure = Figure(figsize=(width, height))
    draw_title(figure, f"From {curve.low} to {curve.high}", curve.note)
    _draw_panel(figure.add_axes((0.1, foot / height, 0.86, panel / height)), curve)
    return figure


def sweeps_figure(results: Results) -> Figure:
    """Return the figure that `draw_sweeps` writes.

    Raises:
        ValueError: if the results have no sweeps.
    """
    from matplotlib.figure import Figure

    dimensions = list(results["sweeps"])
    if not dimensions:
        raise ValueError("the results have no sweeps to draw")
    per_line = min(3, len(dimensions))
    lines = ceil(len(dimensions) / per_line)
    # In inches. The head above a panel has its title, and the foot below the panel has the names of its ends.
    panel, top, head, foot = 2.35, 0.9, 0.55, 0.72
    height = top + lines * (head + panel + foot)
    figure = Figure(figsize=(WIDTH, height))
    draw_title(
        figure,
        "From one side's expert to its opposite's",
        "The expert named on the right weighs w, the one on the left 1 - w.",
    )
    left, right, between = 0.06, 0.975, 0.055
    width = (right - left - between * (per_line - 1)) / per_line
    for at, dimension in enumerate(dimensions):
        line, column = divmod(at, per_line)
        y = 1 - (top + (line + 1) * (head + panel) + line * foot) / height
        axes = figure.add_axes((left + column * (width + between), y, width, panel / height))
        _draw_panel(axes, _curve(results, dimension))
        axes.tick_params(labelleft=column == 0)
    return figure


def _curve(results: Results, dimension: str) -> Curve:
    low, high = results["sides"][dimension]
    return Curve(
        title=dimension,
        low=low,
        high=high,
        score=f"score towards {high}",
        points=results["sweeps"][dimension],
        base=results["base"]["per_dimension"][dimension],
        intervals=results.get("sweep_intervals", {}).get(dimension, ()),
    )


def _draw_panel(axes: Axes, curve: Curve) -> None:
    weights, scores = zip(*curve.points, strict=True)
    quarters = [0, 0.25, 0.5, 0.75, 1]
    axes.set(xlim=(0, 1), ylim=(0, curve.top), xticks=quarters, yticks=[curve.top * share for share in quarters])
    axes.set_xticklabels(["w = 0", "", "0.5", "", "w = 1"])
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    axes.set_yticklabels(["0", "", f"{curve.top / 2:g}", "", f"{curve.top:g}"])
    axes.grid(axis="y", color="#edf0f3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, pad=5, labelsize=9.5, labelcolor=QUIET)
    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(FAINT)
    axes.axhline(curve.base, color=QUIET, linewidth=1, dashes=(4, 3))
    _draw_base_label(axes, curve, scores)
    if curve.intervals:
        lower, upper = zip(*curve.intervals, strict=True)
        axes.fill_between(weights, lower, upper, color=LINE, alpha=0.16, linewidth=0)
    marker = "o" if len(scores) <= _MOST_MARKERS else None
    # Draw in front of the axis, which would hide the lower half of points at 0.
    axes.plot(weights, scores, color=LINE, linewidth=2, marker=marker, markersize=4, clip_on=False, zorder=3)
    axes.text(0, 1.13, curve.title, transform=axes.transAxes, fontsize=11, weight="bold", va="baseline")
    axes.text(0, 1.045, curve.score, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="baseline")
    for x, side, align in ((0, curve.low, "left"), (1, curve.high, "right")):
        axes.text(x, -0.145, side, transform=axes.transAxes, ha=align, va="top", fontsize=10.5)


def _draw_base_label(axes: Axes, curve: Curve, scores: Sequence[float]) -> None:
    """Label the base's line at the end that is farther from the curve, and on the side away from the curve."""
    base = curve.base
    at_left = abs(scores[0] - base) > abs(scores[-1] - base)
    above = (scores[0] if at_left else scores[-1]) < base
    axes.text(
        0 if at_left else 1,
        base + (0.02 if above else -0.025) * curve.top,
        "base alone",
        ha="left" if at_left else "right",
        va="bottom" if above else "top",
        color=QUIET,
        fontsize=9,
    )
