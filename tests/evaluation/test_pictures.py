from __future__ import annotations

import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.image
import numpy as np
import pytest

from personalized_soups.errors import UsageError
from personalized_soups.evaluation.pictures.curves import draw_sweeps, sweeps_figure
from personalized_soups.evaluation.pictures.forecast import draw_forecast, forecast_figure
from personalized_soups.evaluation.pictures.heat_map import combinations_figure, draw_combinations
from personalized_soups.evaluation.pictures.style import DPI
from personalized_soups.evaluation.results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Draw = Callable[[Results, Path], Path]


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _chunks(png: bytes) -> list[bytes]:
    """Return the names of a PNG's chunks."""
    names, at = [], 8
    while at < len(png):
        (length,) = struct.unpack_from(">I", png, at)
        names.append(png[at + 4 : at + 8])
        at += 12 + length
    return names


@pytest.mark.parametrize("draw", [draw_combinations, draw_sweeps])
def test_a_picture_is_written_and_shows_something(results: Results, tmp_path: Path, draw: Draw) -> None:
    path = tmp_path / "picture.png"
    assert draw(results, path) == path
    png = path.read_bytes()
    width, height = struct.unpack_from(">II", png, 16)
    assert width == 9 * DPI
    assert 800 < height < 1400
    assert set(_chunks(png)) == {b"IHDR", b"pHYs", b"IDAT", b"IEND"}  # no text chunk with facts about the machine
    image = matplotlib.image.imread(path)
    assert len({tuple(pixel) for pixel in image[::7, ::7].reshape(-1, image.shape[2]).tolist()}) > 20
    draw(results, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == png


def test_cells_hold_the_numbers_of_the_results(results: Results) -> None:
    (axes,) = combinations_figure(results).axes
    cells = {
        (text.get_position()[0], text.get_position()[1]): text.get_text() for text in axes.texts if text.get_text()
    }
    chosen = [row for row in results["combinations"] if row["method"] == "linear"]
    for y, row in enumerate(chosen):
        line = [text for (x, at), text in sorted(cells.items()) if x >= 0.5 and at == y + 0.52]
        joints = [each["joint"] for each in results["combinations"] if each["sides"] == row["sides"]]
        shown = [row["base_joint"], *joints, row["mean"], row["valid"], row["win_rate_vs_base"]]
        assert line == [f"{value:.2f}" for value in shown]
    averages = [text for (x, at), text in sorted(cells.items()) if x >= 0.5 and at > 8]
    assert averages[:3] == ["0.11", "0.68", "0.58"]


def test_rows_and_columns_are_named_in_full(results: Results) -> None:
    (axes,) = combinations_figure(results).axes
    texts = _texts(axes)
    for side in ("elementary", "expert", "concise", "informative", "friendly", "unfriendly"):
        assert texts.count(side) == 4
    for name in ("alone", "linear", "average", "w = 0.55", "w = 2.2", "chosen: linear"):
        assert name in texts


def test_a_sweep_s_ends_are_named_and_its_line_is_the_data(results: Results) -> None:
    figure = sweeps_figure(results)
    assert len(figure.axes) == 3
    for axes, (dimension, points) in zip(figure.axes, results["sweeps"].items(), strict=True):
        low, high = results["sides"][dimension]
        texts = _texts(axes)
        assert {dimension, low, high, f"score towards {high}", "base alone"} <= set(texts)
        low_x, high_x = (
            next(text.get_position()[0] for text in axes.texts if text.get_text() == side) for side in (low, high)
        )
        assert (low_x, high_x) == (0, 1)
        base, line = axes.lines
        level = results["base"]["per_dimension"][dimension]
        assert np.asarray(base.get_xydata()).tolist() == [[0, level], [1, level]]
        assert np.asarray(line.get_xydata()).tolist() == points
        assert len(axes.collections) == 1


def test_without_intervals_there_is_no_band(results: Results) -> None:
    del results["sweep_intervals"]
    assert not any(axes.collections for axes in sweeps_figure(results).axes)


def test_no_sweeps_cannot_be_drawn(results: Results, tmp_path: Path) -> None:
    results["sweeps"] = {}
    with pytest.raises(ValueError, match="no sweeps to draw"):
        draw_sweeps(results, tmp_path / "sweeps.png")
    assert not list(tmp_path.iterdir())


def test_the_users_settings_are_neither_used_nor_changed(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # its global state belongs to the user
    draw_sweeps(results, tmp_path / "plain.png")
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "black", "savefig.bbox": "tight"}):
        draw_sweeps(results, tmp_path / "dark.png")
        assert matplotlib.rcParams["font.size"] == 31
    assert (tmp_path / "dark.png").read_bytes() == (tmp_path / "plain.png").read_bytes()


def test_a_missing_matplotlib_has_a_mend(results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("personalized_soups.errors.find_spec", lambda name: None)
    with pytest.raises(UsageError) as caught:
        draw_combinations(results, tmp_path / "combinations.png")
    assert "matplotlib" in caught.value.what
    assert "personalized-soups[plot]" in caught.value.mend


def test_the_forecast_shows_every_agreement_and_every_point(tmp_path: Path) -> None:
    rows = {"base": {"calm": 0.5, "keen": 0.25}, "calm": {"calm": 0.97, "keen": 0.03}}
    points = [(0.1, 0.2), (0.9, 1.0), (0.5, 0.5)]
    figure = forecast_figure(rows, points, title="Experts", note="agreement")
    cells, chart = figure.axes
    assert sorted(text.get_text() for text in cells.texts) == ["0.03", "0.25", "0.50", "0.97"]
    assert [label.get_text() for label in cells.get_yticklabels()] == ["base", "calm"]
    (drawn,) = (np.asarray(each.get_offsets()) for each in chart.collections)
    np.testing.assert_allclose(drawn, points)
    assert {text.get_text() for text in figure.texts} == {"Experts", "agreement"}
    written = draw_forecast(rows, points, tmp_path / "forecast.png", title="Experts", note="agreement")
    assert written.read_bytes().startswith(b"\x89PNG")
