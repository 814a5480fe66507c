"""BLAKE3 digests of files. Background threads compute them, so that recording the inputs does not slow down a merge."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from personalized_soups.files.regular import opened, unreadable

# For smaller files, starting blake3's threads costs more than it saves.
_PARALLEL_FROM_BYTES = 1 << 20


def digest_file(path: Path) -> str:
    """Return the BLAKE3 digest of a file's bytes, in hex.

    Raises:
        FileFormatError: if `path` is not a regular file.
        InputError: if the file cannot be read.
    """
    with opened(path) as descriptor:
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:  # an empty file cannot be mapped
                return str(blake3().hexdigest())
            with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as mapped:
                max_threads = blake3.AUTO if size >= _PARALLEL_FROM_BYTES else 1
                return str(blake3(mapped, max_threads=max_threads).hexdigest())
        except (OSError, ValueError) as error:  # ValueError: the file was truncated after fstat
            raise unreadable(path, error) from error


class BackgroundDigests:
    """Computes the digests of files in background threads. `results` waits for all digests.

    Use it as a context manager. At the end of the block, files whose hashing has not started are canceled.
    """

    def __init__(self, paths: Iterable[Path] = (), *, num_threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="digest")
        self._futures: dict[Path, Future[str]] = {}
        for path in paths:
            self.add(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def add(self, path: Path) -> None:
        """Queue a file for hashing. The file must be complete. A path that was added before is not hashed again."""
        if path not in self._futures:
            self._futures[path] = self._pool.submit(digest_file, path)

    def results(self) -> Mapping[Path, str]:
        """Wait until all files are hashed, and return the digest of each file in hex.

        Raises:
            InputError: if a file could not be read.
        """
        return {path: future.result() for path, future in self._futures.items()}
