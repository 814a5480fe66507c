"""Fixtures of the tests of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.studies.pipeline.kitchen import Kitchen


@pytest.fixture
def kitchen(small_base: Path, tmp_path: Path) -> Kitchen:
    """Return a world with experts on a small base."""
    return Kitchen(small_base, tmp_path)
