"""BLAKE3 digests of files, computed beside other work so that provenance does not cost the merge its time."""

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

# blake3 starts its own threads only where a buffer is long enough to pay for them.
_PARALLEL_FROM_BYTES = 1 << 20


def digest_file(path: Path) -> str:
    """Return the BLAKE3 digest of a file's bytes, in hex.

    Raises:
        FileFormatError: if it is no regular file.
        InputError: if it cannot be read.
    """
    with opened(path) as descriptor:
        try:
            size = os.fstat(descriptor).st_size
            if size == 0:  # cannot be mapped
                return str(blake3().hexdigest())
            with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as mapped:
                max_threads = blake3.AUTO if size >= _PARALLEL_FROM_BYTES else 1
                return str(blake3(mapped, max_threads=max_threads).hexdigest())
        except (OSError, ValueError) as error:  # ValueError: the file was cut between the two calls
            raise unreadable(path, error) from error


class BackgroundDigests:
    """Hashes files on threads of its own while the caller computes; `results` waits for what is left.

    A context manager: leaving it without asking for the results drops the files that were not begun.
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
        """Hash one more file, which is whole by now; a path that was given before is not hashed again."""
        if path not in self._futures:
            self._futures[path] = self._pool.submit(digest_file, path)

    def results(self) -> Mapping[Path, str]:
        """Return each file's digest in hex, waiting for those that are not done.

        Raises:
            InputError: if a file could not be read.
        """
        return {path: future.result() for path, future in self._futures.items()}
