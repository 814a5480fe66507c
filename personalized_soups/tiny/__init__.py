"""The embedded default: a tiny base model that ships with the package, and its world of household questions."""

from __future__ import annotations

from pathlib import Path

BASE_FOLDER = Path(__file__).resolve().parent / "base"
