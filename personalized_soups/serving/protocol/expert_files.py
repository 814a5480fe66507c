"""Detects which of the served experts' files have changed since they were loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from personalized_soups.adapters.library import Expert, ExpertLibrary
from personalized_soups.errors import RunError, SoupError
from personalized_soups.files.digest import digest_file
from personalized_soups.files.file_names import CONFIG_FILE, EXPERT_FILE, WEIGHTS_FILE

_FILES = (WEIGHTS_FILE, CONFIG_FILE, EXPERT_FILE)

# For each file of an expert: its inode, size, mtime and ctime, or None if the file does not exist.
Stamp: TypeAlias = tuple[tuple[int, ...] | None, ...]


class ExpertsChangedError(RunError):
    """The files of an expert have changed since they were loaded."""


class ExpertFiles:
    """Remembers the state of the served experts' files when they were loaded.

    Args:
        reopen: opens the library of experts again, to see the files that are on disk now.
    """

    def __init__(self, reopen: Callable[[], ExpertLibrary]) -> None:
        self._reopen = reopen
        self._served: Mapping[str, tuple[Path, Stamp]] = {}
        self._fingerprint = ""

    @property
    def fingerprint(self) -> str:
        """The first 12 hexadecimal digits of a digest of the served experts' names and tensor files."""
        return self._fingerprint

    def look(self) -> tuple[ExpertLibrary, Mapping[str, tuple[Path, Stamp]]]:
        """Open the library that is on disk now, and return it with each expert's folder and stamp.

        The stamps are taken before any tensor is read. So a change during loading is detected later.

        Raises:
            SoupError: if the library cannot be opened.
        """
        library = self._reopen()
        return library, {name: (expert.folder, _stamp(str(expert.folder))) for name, expert in library.items()}

    def serve(self, stamps: Mapping[str, tuple[Path, Stamp]]) -> None:
        """Record that the experts in `stamps` have been loaded, and compute their fingerprint."""
        digest = hashlib.sha256()
        for name, (folder, _) in sorted(stamps.items()):
            with suppress(OSError, SoupError):  # an expert whose files were deleted meanwhile is reported by `check`
                digest.update(f"{name}\0{digest_file(folder / WEIGHTS_FILE)}\0".encode())
        self._fingerprint = digest.hexdigest()[:12]
        self._served = stamps

    def is_changed(self, name: str) -> bool:
        """Return whether an expert's files have changed since they were loaded. Return True for an unknown expert."""
        known = self._served.get(name)
        return known is None or _stamp(str(known[0])) != known[1]

    def check(self, names: Iterable[str]) -> None:
        """Check that the files of these experts have not changed since they were loaded.

        Raises:
            ExpertsChangedError: if files have changed. The message names the experts.
        """
        changed = [name for name in names if self.is_changed(name)]
        if changed:
            raise ExpertsChangedError(
                f"the files of {', '.join(map(repr, changed))} have changed since they were loaded",
                where="experts",
                mend="send POST /v1/experts/reload to load the files as they are now",
            )

    def difference(
        self, library: ExpertLibrary, stamps: Mapping[str, tuple[Path, Stamp]]
    ) -> tuple[list[Expert], list[str]]:
        """Return the experts that are new or changed, and the names of the served experts that no longer exist."""
        changed = [expert for name, expert in library.items() if self._served.get(name) != stamps[name]]
        return changed, [name for name in self._served if name not in library]


def _stamp(folder: str) -> Stamp:
    """Return the stamp of an expert's files, without reading their contents."""
    return tuple(_stamp_of(f"{folder}/{name}") for name in _FILES)


def _stamp_of(path: str) -> tuple[int, ...] | None:
    # called for each expert of each request: os.stat of a string takes a third of the time of Path.stat
    try:
        status = os.stat(path)  # noqa: PTH116
    except OSError:
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
