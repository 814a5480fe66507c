"""Draw a comparison of systems: win rates, a radar of each combination, and the number of trainings."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import cycle
from math import ceil, cos, pi
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.evaluation.pictures.heat_map import draw_cell
from personalized_soups.evaluation.pictures.style import FAINT, INK, QUIET, WIDTH, draw_title, own_settings, write_png
from personalized_soups.evaluation.systems import MOST_DIMENSIONS, TRAININGS, SystemsResults, duel_of

if TYPE_CHECKING:
    from matplotlib.lines import Line2D
    from matplotlib.projections.polar import PolarAxes

# Okabe and Ito's colours, which every kind of color vision tells apart.
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]


def draw_win_rates(results: SystemsResults, path: Path) -> Path:
    """Write a PNG file with the win rate of each system, a row, against each other system, a column.

    Raises:
        UsageError: if matplotlib is missing.
    """
    from matplotlib.figure import Figure

    with own_settings():
        names = [scores["system"] for scores in results["averages"]]
        cell, left, top, bottom = 0.62, 1.9, 1.9, 0.5  # inches
        width, height = max(WIDTH, left + cell * len(names) + 0.3), top + cell * len(names) + bottom
        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((left / width, bottom / height, cell * len(names) / width, cell * len(names) / height))
        axes.set(xlim=(0, len(names)), ylim=(len(names), 0))
        axes.axis("off")
        for y, name in enumerate(names):
            axes.text(-0.12, y + 0.52, _title(name), ha="right", va="center")
            axes.text(y + 0.5, -0.12, _title(name), ha="left", va="bottom", rotation=35, rotation_mode="anchor")
            for x, other in enumerate(names):
                if name != other:
                    draw_cell(axes, x, y, duel_of(results, name, other)["rate"])
        draw_title(
            figure,
            "How often the system of the row wins against that of the column",
            f"{results['duels'][0]['num_judgements']} judgements each: prompts x combinations x dimensions",
        )
        return write_png(figure, path)


def draw_radars(results: SystemsResults, path: Path, *, most: int = 5) -> Path:
    """Write a PNG file with a radar for each combination: the score of some systems towards each of its sides.

    Args:
        results: the results.
        path: the file to write.
        most: the number of systems to draw: those of the primary comparison, and then the first others.

    Raises:
        UsageError: if matplotlib is missing.
    """
    from matplotlib.figure import Figure

    with own_settings():
        combinations = [tuple(sides) for sides in results["combinations"]]
        scores = {(row["system"], tuple(row["sides"])): row["per_dimension"] for row in results["rows"]}
        chosen = _drawn_systems(results, most)
        columns = min(4, len(combinations))
        rows = ceil(len(combinations) / columns)
        size, top, bottom = WIDTH / columns, 1.0, 0.5
        height = top + rows * size + bottom
        figure = Figure(figsize=(WIDTH, height))
        for at, sides in enumerate(combinations):
            row, column = divmod(at, columns)
            x = (column * size + 0.23 * size) / WIDTH
            y = (height - top - (row + 1) * size + 0.24 * size) / height
            axes = figure.add_axes((x, y, 0.54 * size / WIDTH, 0.54 * size / height), projection="polar")
            _draw_radar(axes, sides, {name: [*scores[name, sides].values()] for name in chosen})  # type: ignore[arg-type]
        handles = figure.axes[0].get_lines()[: len(chosen)]
        figure.legend(handles, [_title(name) for name in chosen], loc="lower center", ncols=len(chosen), frameon=False)
        draw_title(figure, "Scores towards each side of a combination", "0 in the middle, 1 at the rim")
        return write_png(figure, path)


def draw_fronts(results: SystemsResults, path: Path) -> Path:
    """Write a PNG file with a panel for each pair of opposing sides: the scores of mixtures towards both.

    Raises:
        UsageError: if matplotlib is missing.
    """
    from matplotlib.figure import Figure

    with own_settings():
        panels = list(dict.fromkeys(tuple(front["sides"]) for front in results["fronts"]))
        systems = list(dict.fromkeys(front["system"] for front in results["fronts"]))
        colours = dict(zip(systems, cycle(COLOURS), strict=False))
        drawn: dict[str, Line2D] = {}
        columns = min(3, len(panels))
        rows = ceil(len(panels) / columns)
        size, top, bottom = WIDTH / columns, 0.95, 0.55
        height = top + rows * size + bottom
        figure = Figure(figsize=(WIDTH, height))
        for at, sides in enumerate(panels):
            row, column = divmod(at, columns)
            x, y = (column + 0.2) * size / WIDTH, (height - top - (row + 0.82) * size) / height
            axes = figure.add_axes((x, y, 0.72 * size / WIDTH, 0.72 * size / height))
            for front in (front for front in results["fronts"] if tuple(front["sides"]) == sides):
                if front["is_opposed"]:
                    axes.plot([0, 1], [1, 0], color=FAINT, linewidth=1)
                xs, ys = zip(*front["points"], strict=True)
                colour = colours[front["system"]]
                (drawn[front["system"]],) = axes.plot(xs, ys, color=colour, marker="o", markersize=4, linewidth=1.4)
            axes.set(xlim=(0, 1.03), ylim=(0, 1.03), xlabel=f"towards {sides[0]}", ylabel=f"towards {sides[1]}")
            axes.set_xticks([0, 0.5, 1])
            axes.set_yticks([0, 0.5, 1])
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
        names = [_title(name) for name in drawn]
        figure.legend(list(drawn.values()), names, loc="lower center", ncols=min(4, len(names)), frameon=False)
        draw_title(figure, "Between two opposing sides", "mean scores of mixtures; no score is beyond a grey line")
        return write_png(figure, path)


def draw_trainings(results: SystemsResults, path: Path) -> Path:
    """Write a PNG file with the number of trainings of each system against the number of dimensions.

    Raises:
        UsageError: if matplotlib is missing.
    """
    from matplotlib.figure import Figure

    with own_settings():
        figure = Figure(figsize=(WIDTH, 4.4))
        axes = figure.add_axes((0.09, 0.13, 0.62, 0.67))
        counts = range(1, MOST_DIMENSIONS + 1)
        used = dict.fromkeys(cost["grows"] for cost in results["costs"] if cost["grows"] in TRAININGS)
        for grows, colour in zip(used, COLOURS, strict=False):
            numbers = [TRAININGS[grows](n) for n in counts]
            axes.plot(list(counts), numbers, color=colour, marker="o", markersize=4)
            named = [_title(cost["system"]) for cost in results["costs"] if cost["grows"] == grows]
            label = "\n".join([f"{grows}:", *named])
            place = (MOST_DIMENSIONS, numbers[-1])
            va = "bottom" if numbers[-1] == 1 else "center"  # the lowest text stays above the axis
            axes.annotate(label, place, xytext=(8, -6), textcoords="offset points", va=va)
        axes.set_yscale("log")
        axes.set_xticks(list(counts))
        axes.set_xlabel("dimensions with two sides each")
        axes.set_ylabel("trainings")
        axes.grid(color=FAINT, linewidth=0.6)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        draw_title(figure, "Trainings that serve all combinations", "two sides for each dimension, logarithmic scale")
        return write_png(figure, path)


def _drawn_systems(results: SystemsResults, most: int) -> list[str]:
    primary = results["primary"]
    names = [primary["system"], primary["minus"], *(scores["system"] for scores in results["averages"])]
    return list(dict.fromkeys(names))[:most]


def _draw_radar(axes: PolarAxes, sides: tuple[str, ...], scores: Mapping[str, list[float]]) -> None:
    angles = [2 * pi * at / len(sides) for at in range(len(sides))]
    for (_, values), colour in zip(scores.items(), COLOURS, strict=False):
        axes.plot([*angles, angles[0]], [*values, values[0]], color=colour, linewidth=1.4)
    axes.set_theta_offset(pi / 2)
    axes.set_ylim(0, 1)
    axes.set_yticks([0.5, 1.0], labels=[])
    axes.set_xticks(angles, labels=[""] * len(sides))
    for angle, side in zip(angles, sides, strict=True):
        is_below = cos(angle) < 0
        axes.text(
            angle,
            1.4 if is_below else 1.15,
            side,
            ha="center",
            va="top" if is_below else "bottom",
            fontsize=8.5,
            color=INK,
        )
    axes.grid(color=FAINT, linewidth=0.7)
    axes.spines["polar"].set_color(QUIET)
    axes.spines["polar"].set_linewidth(0.6)


def _title(system: str) -> str:
    return system.replace("_", " ")
