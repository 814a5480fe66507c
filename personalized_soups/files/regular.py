"""Opening regular files for reading. FIFOs, devices and folders are rejected without waiting."""

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

# `git clone` writes such a pointer instead of a Git LFS file if git-lfs is not installed or skips downloads:
# https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md. Pointers are shorter than 1024 bytes.
_LFS_BEGINNINGS = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
_LFS_MAX_BYTES = 1024

# Suffixes of the files from which transformers loads a configuration or a tokenizer.
_LOADED = frozenset({".json", ".model", ".jinja", ".txt", ".tiktoken"})


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """Yield a descriptor of a regular file, open for reading. Links are followed.

    Raises:
        FileFormatError: if it is not a regular file, or is a Git LFS pointer.
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
                "the path is not a regular file", where=str(path), mend="give a file, not a folder, pipe or device"
            )
        if status.st_size < _LFS_MAX_BYTES:
            _check_no_pointer(descriptor, path)
        yield descriptor
    finally:
        os.close(descriptor)


def read_small(path: Path, max_bytes: int) -> bytes:
    """Return all bytes of a regular file of at most `max_bytes`.

    Raises:
        FileFormatError: if it is longer, or not a regular file.
        InputError: if it cannot be read.
    """
    with opened(path) as descriptor:
        pieces, left = [], max_bytes + 1
        try:
            # the size is not known in advance: the file may grow, and files in /proc report a size of 0
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
    """Raise if a file's first bytes are those of a Git LFS pointer.

    Raises:
        FileFormatError: with the command that downloads the file.
    """
    if data.startswith(_LFS_BEGINNINGS):
        raise FileFormatError(
            "this is a Git LFS pointer file, which only names the real file",
            where=str(path),
            mend="run `git lfs pull` in the repository of the file, or download the real file",
        )


def check_no_lfs_pointers(folder: Path) -> None:
    """Raise if a file of a model folder is a Git LFS pointer, among those from which models and tokenizers are loaded.

    Raises:
        FileFormatError: with the first such file and the command that downloads it.
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
    """Return the error for a file that cannot be read, with the reason."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"the file cannot be read: {reason}", where=str(path), mend="check the path and the permissions")
