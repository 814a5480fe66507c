"""A model with three experts of no dimension."""

from __future__ import annotations

from pathlib import Path

import pytest

from personalized_soups import SoupModel
from tests.mixing.worlds import open_model, write_experts


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """The folders of the experts cold, plain and warm."""
    return write_experts(tmp_path / "experts")


@pytest.fixture
def model(folders: list[Path], small_base: Path) -> SoupModel:
    """The small base with those experts."""
    return open_model(small_base, folders[0].parent)
