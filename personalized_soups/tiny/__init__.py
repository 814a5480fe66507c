"""The embedded base: a tiny model that ships with the package, its corpus of household questions, and its scorers."""

from __future__ import annotations

from pathlib import Path

BASE_FOLDER = Path(__file__).resolve().parent / "base"
