"""BLAKE3 digests of files, computed beside other work so that provenance does not cost the merge its time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from blake3 import blake3

from personalized_soups.errors import InputError

# blake3 starts its own threads only where a buffer is long enough to pay for them.
_PARALLEL_FROM_BYTES = 1 << 20


def digest_file(path: Path) -> str:
    """Return the BLAKE3 digest of a file's bytes, in hex.

    Raises:
        InputError: if the file cannot be read.
    """
    try:
        size = path.stat().st_size
        hasher = blake3(max_threads=blake3.AUTO if size >= _PARALLEL_FROM_BYTES else 1)
        if size >= _PARALLEL_FROM_BYTES:
            hasher.update_mmap(path)
        else:
            hasher.update(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"the file cannot be read: {error.strerror}", where=str(path), mend="check the path and its permissions"
        ) from error
    return str(hasher.hexdigest())


class BackgroundDigests:
    """Hashes files on a thread while the caller computes; `results` waits for what is left.

    A context manager: leaving it without asking for the results drops the files that were not begun.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="digest")
        self._futures: dict[Path, Future[str]] = {}
        for path in paths:
            if path not in self._futures:
                self._futures[path] = self._pool.submit(digest_file, path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def results(self) -> Mapping[Path, str]:
        """Return each file's digest in hex, waiting for those that are not done.

        Raises:
            InputError: if a file could not be read.
        """
        return {path: future.result() for path, future in self._futures.items()}
