"""A small Llama as a GGUF file, and a cache folder of its own for each test."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gguf_files import write_gguf


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "the cache"
    monkeypatch.setenv("PSOUPS_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def small_gguf(small_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the session's small base as a GGUF file of type Q8_0. Tests copy it before they change it."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", small_base, quantization="Q8_0")
