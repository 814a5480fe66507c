"""Opening a file for reading where it is one: a FIFO, a device or a folder is refused, and waited for by nobody."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from personalized_soups.errors import FileFormatError, InputError

# Opening a FIFO would wait for somebody to write to it.
_FLAGS = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_PIECE = 1 << 20

# What `git clone` leaves in the place of a file that Git LFS keeps, where git-lfs is not installed or was told to skip
# it: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md. Pointers are shorter than 1024 bytes.
_LFS_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LFS_MAX_BYTES = 1024

# The kinds of files that transformers loads a configuration or a tokenizer from.
_LOADED = frozenset({".json", ".model", ".jinja", ".txt", ".tiktoken"})


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a descriptor of a regular file, open for reading; links are followed.

    Raises:
        FileFormatError: if it is something else than a regular file, or a Git LFS pointer.
        InputError: if it cannot be opened.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FileFormatError(
                "this is not a regular file", where=str(path), mend="give a file on a disk, no folder, pipe or device"
            )
        if status.st_size < _LFS_MAX_BYTES:
            _check_no_pointer(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


def read_small(path: Path, max_bytes: int) -> bytes:
    """Return all bytes of a regular file of at most `max_bytes`.

    Raises:
        FileFormatError: if it is longer, or something else than a regular file.
        InputError: if it cannot be read.
    """
    with opened(path) as descriptor:
        pieces, left = [], max_bytes + 1
        try:
            # a file may grow while it is read, and those of /proc do not tell their size
            while left and (piece := os.read(descriptor, min(left, _PIECE))):
                pieces.append(piece)
                left -= len(piece)
        except OSError as error:
            raise unreadable(path, error) from error
    if not left:
        raise FileFormatError(
            f"the file is longer than {max_bytes} bytes",
            where=str(path),
            mend="give the file that a tool wrote, not one of another kind",
        )
    return b"".join(pieces)


def check_no_lfs_pointer(data: bytes, path: Path) -> None:
    """Raise if a file's bytes, or their beginning, are a Git LFS pointer instead of the file.

    Raises:
        FileFormatError: with the command that fetches the file.
    """
    if data.startswith(_LFS_BEGINNINGS):
        raise FileFormatError(
            "this is a Git LFS pointer, not the file itself",
            where=str(path),
            mend="run `git lfs pull` in the repository that it is in, or download the file",
        )


def check_no_lfs_pointers(folder: Path) -> None:
    """Raise if a file of a model folder from which a model or tokenizer is loaded is a Git LFS pointer.

    Raises:
        FileFormatError: naming the first of them, with the command that fetches it.
        InputError: if one cannot be opened.
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
    """Return the error that says of a file that it cannot be read, and why."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"the file cannot be read: {reason}", where=str(path), mend="check the path and its permissions")
