"""Draw the heat map of an evaluation: the scores of the base and of each method for every combination of sides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from personalized_soups.evaluation.pictures.style import FAINT, INK, QUIET, WIDTH, draw_title, own_settings, write_png
from personalized_soups.evaluation.results import Results, combinations_of, row_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# One hue from almost white to dark. Lightness alone gives the order, so every kind of color vision can read the map.
SHADES = ["#f4f8fa", "#cfe3ea", "#93c2d1", "#4f9ab1", "#1f6f8b", "#12475c"]


def draw_combinations(results: Results, path: Path) -> Path:
    """Write a PNG file with a row for each combination of sides.

    The columns are the joint scores of the base, of each method and of other systems that the results compare, and
    three more scores of the best method.

    Raises:
        UsageError: if matplotlib is missing.
        ValueError: if the results lack the scores of a combination with a method.
    """
    with own_settings():
        return write_png(combinations_figure(results), path)


def combinations_figure(results: Results) -> Figure:
    """Return the figure that `draw_combinations` writes.

    Raises:
        ValueError: if the results lack the scores of a combination with a method.
    """
    from matplotlib.figure import Figure

    rows = combinations_of(results)
    columns = _columns(results)
    num_joint = len(columns) - 3
    row, top, bottom = 0.40, 1.76, 0.74  # inches
    height = top + row * (len(rows) + 1.25) + bottom
    figure = Figure(figsize=(WIDTH, height))
    left = 0.385
    axes = figure.add_axes((left, bottom / height, 0.975 - left, 1 - (top + bottom) / height))
    gap = 0.3
    xs = [at + (gap if at >= num_joint else 0.0) for at in range(len(columns))]
    axes.set(xlim=(0, len(columns) + gap), ylim=(len(rows) + 1.25, 0))
    axes.axis("off")
    for x, column in zip(xs, columns, strict=True):
        _draw_head(axes, x + 0.5, column, scale=min(1.0, _ROOMY / len(columns)))
        for y, value in enumerate(column.values):
            draw_cell(axes, x, y, value)
        draw_cell(axes, x, len(rows) + 0.25, fmean(column.values), weight="bold")
    chosen = f"chosen: {results['best_method']}"
    _draw_groups(axes, [("joint score", 0, num_joint), (chosen, xs[num_joint], xs[-1] + 1)])
    _draw_names(axes, rows)
    draw_title(
        figure,
        "How well each merged model does what was asked",
        f"{len(rows)} combinations of preferences, {results['num_prompts']} prompts each",
    )
    notes = (
        "Joint score: share of answers that are valid and on the asked side of every dimension."
        f"{' Prompt: the instructions of the sides.' if len(columns) > len(results['methods']) + 4 else ''}\n"
        "Mean score: over the dimensions, 0 for an invalid answer. "
        "Wins: share of comparisons with the base, ties count half."
    )
    figure.text(0.025, 0.2 / height, notes, color=QUIET, fontsize=9, va="bottom", linespacing=1.45)
    return figure


class _Column(NamedTuple):
    """One column of the heat map."""

    above: str  # first line of the heading
    below: str  # second line of the heading
    note: str  # small print below the heading
    values: list[float]  # a value for each combination
    is_chosen: bool = False  # whether the heading is bold


def _columns(results: Results) -> list[_Column]:
    """Return the columns: joint scores of the base, of each method and other system, then three of the best method."""
    rows, best = combinations_of(results), results["best_method"]
    chosen = [row_of(results, sides, best) for sides in rows]
    columns = [_Column("base", "alone", "", [row["base_joint"] for row in chosen])]
    columns += _system_columns(results, _BEFORE_SOUPS)
    for method in results["methods"]:
        above, _, below = method["method"].rpartition("_")
        joint = [row_of(results, sides, method["method"])["joint"] for sides in rows]
        columns.append(_Column(above, below, f"w = {method['weight']:.3g}", joint, method["method"] == best))
    return [
        *columns,
        *_system_columns(results, _AFTER_SOUPS),
        _Column("mean", "score", "", [row["mean"] for row in chosen]),
        _Column("valid", "answers", "", [row["valid"] for row in chosen]),
        _Column("wins", "vs base", "", [row["win_rate_vs_base"] for row in chosen]),
    ]


# The two lines of the heading of each further system, to the left and to the right of the soups.
_BEFORE_SOUPS = {"preference_prompting": ("prompt", "alone"), "single_expert": ("single", "expert")}
_AFTER_SOUPS = {"soup_prompting": ("soup +", "prompt")}
# So many columns have room for headings of the usual size.
_ROOMY = 8


def _system_columns(results: Results, headings: Mapping[str, tuple[str, str]]) -> list[_Column]:
    """Return the joint scores of those systems of `headings` that the results compare."""
    if "comparison" not in results:
        return []
    joint = {(row["system"], tuple(row["sides"])): row["joint"] for row in results["comparison"]["rows"]}
    rows = combinations_of(results)
    return [
        _Column(above, below, "", [joint[system, sides] for sides in rows])
        for system, (above, below) in headings.items()
        if (system, rows[0]) in joint
    ]


def _draw_head(axes: Axes, x: float, column: _Column, *, scale: float) -> None:
    weight = "bold" if column.is_chosen else "normal"
    for y, line in ((-0.95, column.above.replace("_", " ")), (-0.58, column.below)):
        axes.text(x, y, line, ha="center", va="baseline", fontsize=9.5 * scale, weight=weight)
    axes.text(x, -0.2, column.note, ha="center", va="baseline", fontsize=8.5 * scale, color=QUIET)


def draw_cell(axes: Axes, x: float, y: float, value: float, **text: Any) -> None:
    """Draw a square of width 1 whose shade and text are a value in [0, 1]. Its upper left corner is at (x, y)."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shade = LinearSegmentedColormap.from_list("shades", SHADES)(min(max(value, 0.0), 1.0))
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=2))
    # The luma of Rec. 709. At 0.5, ink and white have about the same contrast on these shades.
    is_dark = 0.2126 * shade[0] + 0.7152 * shade[1] + 0.0722 * shade[2] < 0.5
    colour = "white" if is_dark else INK
    axes.text(x + 0.5, y + 0.52, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10.5, **text)


def _draw_groups(axes: Axes, groups: list[tuple[str, float, float]]) -> None:
    for name, start, end in groups:
        axes.plot([start + 0.06, end - 0.06], [-1.5, -1.5], color=FAINT, linewidth=1, clip_on=False)
        axes.text((start + end) / 2, -1.62, name, ha="center", va="bottom", color=QUIET, fontsize=10)


def _draw_names(axes: Axes, rows: list[tuple[str, ...]]) -> None:
    """Write the sides of each combination to the left of its cells, in one column for each dimension."""
    lengths = [max(len(sides[at]) for sides in rows) + 2.5 for at in range(len(rows[0]))]
    size = min(10.0, 390 / sum(lengths))  # 39 letters fit at 10 points
    at_height = axes.get_yaxis_transform()
    left, right = -0.612, -0.02  # in units of the axes' width
    start = left
    for at, length in enumerate(lengths):
        for y, sides in enumerate(rows):
            axes.text(start, y + 0.52, sides[at], transform=at_height, va="center", fontsize=size)
        start += (right - left) * length / sum(lengths)
    axes.text(left, len(rows) + 0.77, "average", transform=at_height, va="center", fontsize=10, weight="bold")
