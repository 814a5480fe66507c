"""Define the look of all pictures, and write figures as PNG files.

With the same version of matplotlib, the same results give the same picture on any machine and with any user settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from personalized_soups.errors import check_extra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 9.0  # in inches; at 900 pixels, text of 10 points is 14 pixels high
DPI = 200

INK, QUIET, FAINT = "#22303c", "#6b7885", "#d5dbe1"
LINE = "#1f6f8b"


@contextmanager
def own_settings() -> Iterator[None]:
    """Draw with matplotlib's defaults instead of the user's settings while the block runs.

    Raises:
        UsageError: if matplotlib is missing.
    """
    check_extra("plot", "matplotlib")
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"font.family": "DejaVu Sans", "font.size": 10, "text.color": INK})
        yield


def write_png(figure: Figure, path: Path) -> Path:
    """Write a figure as a PNG file without metadata, and return the path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return path


def draw_title(figure: Figure, title: str, subtitle: str) -> None:
    """Write title and subtitle at the top left of the figure."""
    height = figure.get_size_inches()[1]
    figure.text(0.025, 1 - 0.36 / height, title, fontsize=13, weight="bold", va="center")
    figure.text(0.025, 1 - 0.64 / height, subtitle, fontsize=10, color=QUIET, va="center")
