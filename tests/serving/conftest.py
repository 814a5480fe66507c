"""One server for the tests of a module that change nothing in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from personalized_soups.serving.engine.limits import Limits
from tests.mixing.worlds import write_experts

if TYPE_CHECKING:
    # needs a web server, which may be missing: pytest imports this file before it can skip a test
    from tests.serving.servers import RunningServer


@pytest.fixture(scope="session")
def expert_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of three experts of the small base; nothing changes them."""
    folder = tmp_path_factory.mktemp("served") / "experts"
    write_experts(folder)
    return folder


@pytest.fixture(scope="module")
def served(small_base: Path, expert_folders: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    from personalized_soups.serving.web.settings import Settings
    from tests.serving.servers import running

    store = tmp_path_factory.mktemp("store") / "profiles.db"
    settings = Settings("small", limits=Limits(max_rows=16, max_context=256), default_max_tokens=24)
    with running(small_base, expert_folders, settings, profiles=store, dtype="auto") as found:
        yield found
