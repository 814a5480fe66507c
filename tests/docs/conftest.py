"""A folder as the pages take it for granted: experts of the embedded base, as `experts` and as `quickstart/experts`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.experts import write_expert

_SIDES = ("elementary", "expert", "concise", "informative", "friendly", "unfriendly")


@pytest.fixture(scope="session")
def expert_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of random experts for the embedded base, one for each side. Tests must not change it."""
    folder = tmp_path_factory.mktemp("experts")
    shapes = {f"model.layers.{layer}.mlp.up_proj": (384, 128) for layer in range(4)}
    for seed, side in enumerate(_SIDES):
        write_expert(folder / side, seed=seed, rank=2, alpha=4, shapes=shapes)
    return folder


@pytest.fixture
def workplace(expert_folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Change into a fresh folder with the experts in it; modules that are imported from it are forgotten afterwards."""
    shutil.copytree(expert_folders, tmp_path / "experts")
    shutil.copytree(expert_folders, tmp_path / "quickstart" / "experts")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]
