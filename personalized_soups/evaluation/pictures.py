"""The evaluation in two pictures: the table of the combinations as a heat map, and the sweeps.

They are made to be read 900 pixels wide, and hold nothing of the machine or the user's matplotlib settings: the same
results give the same picture with the same version of matplotlib.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from personalized_soups.errors import check_extra
from personalized_soups.evaluation.results import Interval, Results, combinations_of, row_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 9.0  # inches; shown 900 pixels wide, 10 points are 14 pixels high
DPI = 200

INK, QUIET, FAINT = "#22303c", "#6b7885", "#d5dbe1"
LINE = "#1f6f8b"
_MOST_MARKERS = 25  # more of them run together
# One hue from almost white to dark: lightness alone orders it, so it reads the same for every kind of colour vision.
SHADES = ["#f4f8fa", "#cfe3ea", "#93c2d1", "#4f9ab1", "#1f6f8b", "#12475c"]


def draw_combinations(results: Results, path: Path) -> Path:
    """Write a PNG: a row for each combination, joint scores of the base and each method, more of the best method.

    Raises:
        UsageError: if matplotlib is missing.
        ValueError: if the results lack a row of a combination under a method.
    """
    with _own_settings():
        return _write(combinations_figure(results), path)


def draw_sweeps(results: Results, path: Path) -> Path:
    """Write a PNG: a panel for each dimension, its score against the weight of one side's expert.

    Raises:
        UsageError: if matplotlib is missing.
        ValueError: if there are no sweeps.
    """
    with _own_settings():
        return _write(sweeps_figure(results), path)


def draw_curve(curve: Curve, path: Path) -> Path:
    """Write a PNG of one panel: a score against the weight of one side's expert.

    Raises:
        UsageError: if matplotlib is missing.
    """
    with _own_settings():
        return _write(curve_figure(curve), path)


@contextmanager
def _own_settings() -> Iterator[None]:
    """Draw with matplotlib's own defaults, whatever the user's matplotlibrc says; they are put back afterwards."""
    check_extra("plot", "matplotlib")
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK})
        yield


def _write(figure: Figure, path: Path) -> Path:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def combinations_figure(results: Results) -> Figure:
    """Return the heat map, not yet drawn. The arguments and errors are those of `draw_combinations`."""
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
        _draw_head(axes, x + 0.5, column)
        for y, value in enumerate(column.values):
            _draw_cell(axes, x, y, value)
        _draw_cell(axes, x, len(rows) + 0.25, fmean(column.values), weight="bold")
    chosen = f"chosen: {results['best_method']}"
    _draw_groups(axes, [("joint score", 0, num_joint), (chosen, xs[num_joint], xs[-1] + 1)])
    _draw_names(axes, rows)
    _draw_title(
        figure,
        "How well each merged model does what was asked",
        f"{len(rows)} combinations of preferences, {results['num_prompts']} prompts each",
    )
    notes = (
        "Joint score: share of answers that are valid and on the asked side of every dimension.\n"
        "Mean score: over the dimensions, 0 for an invalid answer. "
        "Wins: share of comparisons with the base, ties count half."
    )
    figure.text(0.025, 0.2 / height, notes, color=QUIET, fontsize=9, va="bottom", linespacing=1.45)
    return figure


class _Column(NamedTuple):
    """A heading of two lines and a note below it, and a value for each combination."""

    above: str
    below: str
    note: str
    values: list[float]
    is_chosen: bool = False


def _columns(results: Results) -> list[_Column]:
    """Return joint scores, of the base and of each method, then three more scores of the chosen method."""
    rows, best = combinations_of(results), results["best_method"]
    chosen = [row_of(results, sides, best) for sides in rows]
    columns = [_Column("base", "alone", "", [row["base_joint"] for row in chosen])]
    for each in results["methods"]:
        above, _, below = each["method"].rpartition("_")
        joint = [row_of(results, sides, each["method"])["joint"] for sides in rows]
        columns.append(_Column(above, below, f"w = {each['weight']:.3g}", joint, each["method"] == best))
    return [
        *columns,
        _Column("mean", "score", "", [row["mean"] for row in chosen]),
        _Column("valid", "answers", "", [row["valid"] for row in chosen]),
        _Column("wins", "vs base", "", [row["win_rate_vs_base"] for row in chosen]),
    ]


def _draw_head(axes: Axes, x: float, column: _Column) -> None:
    weight = "bold" if column.is_chosen else "normal"
    for y, line in ((-0.95, column.above.replace("_", " ")), (-0.58, column.below)):
        axes.text(x, y, line, ha="center", va="baseline", fontsize=9.5, weight=weight)
    axes.text(x, -0.2, column.note, ha="center", va="baseline", fontsize=8.5, color=QUIET)


def _draw_cell(axes: Axes, x: float, y: float, value: float, **text: Any) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    shade = LinearSegmentedColormap.from_list("shades", SHADES)(min(max(value, 0.0), 1.0))
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=shade, edgecolor="white", linewidth=2))
    # Rec. 709 luma; at .5 ink and white stand out about equally from these shades
    is_dark = 0.2126 * shade[0] + 0.7152 * shade[1] + 0.0722 * shade[2] < 0.5
    colour = "white" if is_dark else INK
    axes.text(x + 0.5, y + 0.52, f"{value:.2f}", ha="center", va="center", color=colour, fontsize=10.5, **text)


def _draw_groups(axes: Axes, groups: list[tuple[str, float, float]]) -> None:
    for name, start, end in groups:
        axes.plot([start + 0.06, end - 0.06], [-1.5, -1.5], color=FAINT, linewidth=1, clip_on=False)
        axes.text((start + end) / 2, -1.62, name, ha="center", va="bottom", color=QUIET, fontsize=10)


def _draw_names(axes: Axes, rows: list[tuple[str, ...]]) -> None:
    """Write each combination's sides left of its cells, a column for each dimension."""
    lengths = [max(len(sides[at]) for sides in rows) + 2.5 for at in range(len(rows[0]))]
    size = min(10.0, 390 / sum(lengths))  # as many letters as there is room for at 10 points
    at_height = axes.get_yaxis_transform()
    left, right = -0.612, -0.02  # of the axes' width
    start = left
    for at, length in enumerate(lengths):
        for y, sides in enumerate(rows):
            axes.text(start, y + 0.52, sides[at], transform=at_height, va="center", fontsize=size)
        start += (right - left) * length / sum(lengths)
    axes.text(left, len(rows) + 0.77, "average", transform=at_height, va="center", fontsize=10, weight="bold")


def _draw_title(figure: Figure, title: str, more: str) -> None:
    height = figure.get_size_inches()[1]
    figure.text(0.025, 1 - 0.36 / height, title, fontsize=13, weight="bold", va="center")
    figure.text(0.025, 1 - 0.64 / height, more, fontsize=10, color=QUIET, va="center")


@dataclass(frozen=True, slots=True)
class Curve:
    """One sweep: (w, score) by rising w; the expert of the `high` side weighs w, that of the `low` side 1 - w.

    `score` says what is measured, `base` what the base alone has, `intervals` the points' 95% intervals, `note` how the
    experts weigh. The scores lie between 0 and `top`.
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


def curve_figure(curve: Curve) -> Figure:
    """Return the one panel, not yet drawn."""
    from matplotlib.figure import Figure

    width, panel, top, foot = WIDTH * 0.62, 2.9, 1.2, 0.6  # inches
    height = top + panel + foot
    figure = Figure(figsize=(width, height))
    _draw_title(figure, f"From {curve.low} to {curve.high}", curve.note)
    _draw_panel(figure.add_axes((0.1, foot / height, 0.86, panel / height)), curve)
    return figure


def sweeps_figure(results: Results) -> Figure:
    """Return the sweeps' panels, not yet drawn. The arguments and errors are those of `draw_sweeps`."""
    from matplotlib.figure import Figure

    dimensions = list(results["sweeps"])
    if not dimensions:
        raise ValueError("the results have no sweeps to draw")
    per_line = min(3, len(dimensions))
    lines = ceil(len(dimensions) / per_line)
    # inches; a panel's title stands in the head above it, the names of its ends in the foot below it
    panel, top, head, foot = 2.35, 0.9, 0.55, 0.72
    height = top + lines * (head + panel + foot)
    figure = Figure(figsize=(WIDTH, height))
    _draw_title(
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
    # above the axis, which would cut points at 0
    axes.plot(weights, scores, color=LINE, linewidth=2, marker=marker, markersize=4, clip_on=False, zorder=3)
    axes.text(0, 1.13, curve.title, transform=axes.transAxes, fontsize=11, weight="bold", va="baseline")
    axes.text(0, 1.045, curve.score, transform=axes.transAxes, fontsize=9.5, color=QUIET, va="baseline")
    for x, side, align in ((0, curve.low, "left"), (1, curve.high, "right")):
        axes.text(x, -0.145, side, transform=axes.transAxes, ha=align, va="top", fontsize=10.5)


def _draw_base_label(axes: Axes, curve: Curve, scores: Sequence[float]) -> None:
    """Name the base's line at the end where the curve is farther from it, on the side away from the curve."""
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
