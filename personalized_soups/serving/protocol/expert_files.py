"""The experts' folders while they are served: what has changed since they were loaded is noticed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.errors import SoupError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, EXPERT_FILE, WEIGHTS_FILE
from personalized_soups.serving.protocol.faults import ApiError

_FILES = (WEIGHTS_FILE, CONFIG_FILE, EXPERT_FILE)

Stamp: TypeAlias = tuple[tuple[int, ...] | None, ...]


class ExpertFiles:
    """What the folders of the served experts looked like when they were loaded.

    Args:
        reopen: opens the library anew.
    """

    def __init__(self, reopen: Callable[[], ExpertLibrary]) -> None:
        self._reopen = reopen
        self._served: Mapping[str, tuple[Path, Stamp]] = {}
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """What the served experts are, by their tensors: 12 hex digits."""
        return self._fingerprint

    def look(self) -> tuple[ExpertLibrary, Mapping[str, tuple[Path, Stamp]]]:
        """Return the library as it is, and its stamps, taken before anything of the experts is read.

        Raises:
            SoupError: if the library can't be opened.
        """
        library = self._reopen()
        return library, {name: (expert.folder, _stamp(str(expert.folder))) for name, expert in library.items()}

    def serve(self, stamps: Mapping[str, tuple[Path, Stamp]]) -> None:
        """Take it that experts were loaded from what looked like this."""
        digest = hashlib.sha256()
        for name, (folder, _) in sorted(stamps.items()):
            with suppress(OSError, SoupError):  # gone already: it is refused as changed
                digest.update(f"{name}\0{digest_file(folder / WEIGHTS_FILE)}\0".encode())
        self._fingerprint = digest.hexdigest()[:12]
        self._served = stamps

    def is_changed(self, name: str) -> bool:
        """Whether an expert's files are others than those that were loaded, or gone; so is one that is not known."""
        known = self._served.get(name)
        return known is None or _stamp(str(known[0])) != known[1]

    def check(self, names: Iterable[str]) -> None:
        """Raise if one of these experts has changed.

        Raises:
            ApiError: 503, naming them.
        """
        changed = [name for name in names if self.is_changed(name)]
        if changed:
            raise ApiError(
                503,
                f"the files of {', '.join(map(repr, changed))} have changed since they were loaded; "
                "POST /v1/experts/reload serves what is there now",
                code="experts_changed",
                headers={"Retry-After": "5"},
            )

    def difference(
        self, library: ExpertLibrary, stamps: Mapping[str, tuple[Path, Stamp]]
    ) -> tuple[list[Expert], list[str]]:
        """Return the experts to be loaded (new or changed) and the names of those that are gone."""
        fresh = [expert for name, expert in library.items() if self._served.get(name) != stamps[name]]
        return fresh, [name for name in self._served if name not in library]


def _stamp(folder: str) -> Stamp:
    """Return what tells a folder's files from others, without reading them."""

    return tuple(_stamp_of(f"{folder}/{name}") for name in _FILES)


def _stamp_of(path: str) -> tuple[int, ...] | None:
    # asked for each expert of each request: os.stat of a string takes a third of Path.stat's time
    try:
        found = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return (found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
