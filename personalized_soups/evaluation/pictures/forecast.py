"""Draw a heat map of experts on traits, next to the forecast of soups against what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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

# Two hues, from disagreement over indifference to agreement.
_SHADES = ["#b5532d", "#f4f1ec", LINE]


def draw_forecast(
    rows: Mapping[str, Mapping[str, float]],
    points: Sequence[tuple[float, float]],
    path: Path,
    *,
    title: str,
    note: str,
) -> Path:
    """Write a PNG file with the share of each column's items on which each row's model agrees, and the forecast.

    Args:
        rows: for each model, the agreement in [0, 1] with each trait.
        points: the forecast and the measured agreement of each soup, in [0, 1].
        path: the file.
        title: the title of the picture.
        note: a line below the title.

    Raises:
        UsageError: if matplotlib is missing.
    """
    with own_settings():
        return write_png(forecast_figure(rows, points, title=title, note=note), path)


def forecast_figure(
    rows: Mapping[str, Mapping[str, float]], points: Sequence[tuple[float, float]], *, title: str, note: str
) -> Figure:
    """Return the figure that `draw_forecast` writes."""
    from matplotlib.figure import Figure

    top, bottom = 1.3, 0.85  # inches
    height = max(4.6, top + bottom + 0.36 * len(rows))
    figure = Figure(figsize=(WIDTH, height))
    places = [(left, bottom / height, 0.32, 1 - (top + bottom) / height) for left in (0.215, 0.645)]
    _draw_cells(figure.add_axes(places[0]), rows)
    _draw_points(figure.add_axes(places[1]), points)
    draw_title(figure, title, note)
    return figure


def _draw_cells(axes: Axes, rows: Mapping[str, Mapping[str, float]]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    columns = list(next(iter(rows.values())))
    values = [[rows[name][column] for column in columns] for name in rows]
    axes.imshow(values, cmap=LinearSegmentedColormap.from_list("diverging", _SHADES), vmin=0, vmax=1, aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            colour = "white" if abs(value - 0.5) > 0.35 else INK
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_yticks(range(len(rows)), list(rows), fontsize=9)
    axes.set_xticks(range(len(columns)), [column.replace("-", "-\n") for column in columns], fontsize=8.5)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title("agreement with each trait", fontsize=10, color=QUIET, loc="left", pad=8)


def _draw_points(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    axes.plot([0, 1], [0, 1], color=FAINT, linewidth=1.2, zorder=0)
    forecast, measured = zip(*points, strict=True)
    axes.scatter(forecast, measured, s=14, color=LINE, alpha=0.55, linewidths=0, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="forecast agreement of a soup", ylabel="measured agreement")
    axes.tick_params(labelsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_title("forecast against measured", fontsize=10, color=QUIET, loc="left", pad=8)
