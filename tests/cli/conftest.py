"""The type of the fixture `psoups`, which is in tests/conftest.py because tests of other folders use it too."""

from __future__ import annotations

from collections.abc import Callable

Run = Callable[..., tuple[int, str, str]]
