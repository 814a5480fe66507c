"""Open regular files for reading. FIFOs, devices and folders are rejected without waiting for data."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personalized_soups.errors import FileFormatError, InputError

# Without O_NONBLOCK, opening a FIFO would wait for a writer.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 1 << 20

# The beginnings of Git LFS pointers. `git clone` writes a pointer instead of a large file if git-lfs is not installed
# or skips downloads. Pointers are shorter than 1024 bytes.
# See https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
_LFS_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LFS_MAX_BYTES = 1024

# Suffixes of the files from which transformers loads a configuration or a tokenizer.
_LOADED = frozenset({".json", ".model", ".jinja", ".txt", ".tiktoken"})


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a file descriptor of a regular file that is open for reading. Links are followed.

    Raises:
        FileFormatError: if `path` is not a regular file, or is a Git LFS pointer.
        InputError: if the file cannot be opened.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileFormatError(
                "the path is not a regular file", where=str(path), mend="give a file, not a folder, pipe or device"
            )
        if status.st_size < _LFS_MAX_BYTES:
            _check_no_pointer(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


def read_small(path: Path, max_bytes: int) -> bytes:
    """Return all bytes of a regular file.

    Raises:
        FileFormatError: if the file is larger than `max_bytes`, is not a regular file, or is a Git LFS pointer.
        InputError: if the file cannot be read.
    """
    with opened(path) as descriptor:
        pieces, left = [], max_bytes + 1
        try:
            # The size is not known before reading: the file may grow, and files in /proc report a size of 0.
            while left and (piece := os.read(descriptor, min(left, _PIECE))):
                pieces.append(piece)
                left -= len(piece)
        except OSError as error:
            raise unreadable(path, error) from error
    if not left:
        raise FileFormatError(
            f"the file is larger than {max_bytes} bytes, the limit for files of this kind",
            where=str(path),
            mend="check the path: a file of this kind is normally much smaller",
        )
    return b"".join(pieces)


def check_no_lfs_pointer(data: bytes, path: Path) -> None:
    """Raise an error if a file is a Git LFS pointer.

    Args:
        data: the first bytes of the file, or all its bytes.
        path: the file, which the error message names.

    Raises:
        FileFormatError: if it is. The message contains the command that downloads the real file.
    """
    if data.startswith(_LFS_BEGINNINGS):
        raise FileFormatError(
            "this is a Git LFS pointer file, which only names the real file",
            where=str(path),
            mend="run `git lfs pull` in the repository of the file, or download the real file",
        )


def check_no_lfs_pointers(folder: Path) -> None:
    """Raise an error if a configuration or tokenizer file of a model folder is a Git LFS pointer.

    Raises:
        FileFormatError: for the first pointer. The message contains the command that downloads the real file.
        InputError: if a file cannot be opened.
    """
    for path in sorted(folder.iterdir()):
        if path.suffix in _LOADED and path.is_file():
            with opened(path):
                pass


def _check_no_pointer(descriptor: int, path: Path) -> None:
    try:
        beginning = os.read(descriptor, max(map(len, _LFS_BEGINNINGS)))
        os.lseek(descriptor, 0, os.SEEK_SET)
    except OSError as error:
        raise unreadable(path, error) from error
    check_no_lfs_pointer(beginning, path)


def unreadable(path: Path, error: OSError | ValueError) -> InputError:
    """Return an error which says that a file cannot be read, and why."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"the file cannot be read: {reason}", where=str(path), mend="check the path and the permissions")
